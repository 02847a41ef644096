"""What is assumed of H100 and H200 machines where no hardware file is named."""

import os

from megatron_helix.machine.hardware import Hardware, Link, Quantity

CARDS = ("H100", "H200", "H800", "GH200")
_MEASURED = "measured by helix calibrate with torch 2.11, two H200 of one host"

HOPPER = Hardware(
    name="Hopper",
    devices=8,
    devices_per_node=8,
    gemm=Quantity(value=658.5, unit="TFLOP/s", source=_MEASURED),
    memory=Quantity(value=80, unit="GB", source="NVIDIA H100 datasheet, SXM5"),
    memory_bandwidth=Quantity(value=3.0, unit="TB/s", source="a copy alone on one H100, measured"),
    intra_node=Link(
        bandwidth=Quantity(value=301.7, unit="GB/s", source=_MEASURED),
        latency=Quantity(value=50.08, unit="us", source=_MEASURED),
    ),
    inter_node=Link(
        bandwidth=Quantity(
            value=50,
            unit="GB/s",
            source="ConnectX-7 datasheet, one 400 Gb/s port a GPU",
            achieved=0.9,
            achieved_source="assumption; what protocol overhead leaves",
        ),
        latency=Quantity(value=60, unit="us", source="assumption; a hop within a node and 10 us"),
    ),
    beside=0.72,
    beside_source="NCCL's kernels beside others in steps of two H200, by torch's profiler: 53 of 75"
    " ms (weights gathered, 4 layers of 8192), 155 of 206 (12 of 3584)",
)


def of_card(name: str, devices: int) -> Hardware | None:
    """The machine of ``devices`` such cards, in the nodes that torchrun says; None for others.

    Args:
        name: as CUDA has it.
        devices: ranks of the run.
    """
    if not any(card in name for card in CARDS):
        return None
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", min(devices, HOPPER.devices_per_node)))
    return HOPPER.model_copy(update={"devices": devices, "devices_per_node": per_node})

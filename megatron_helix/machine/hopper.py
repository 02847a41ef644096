"""What is assumed of H100 and H200 machines where no hardware file is named."""

import os
from typing import Any

from megatron_helix.machine.hardware import Hardware, Overlap
from megatron_helix.machine.quantities import Link, Quantity

OF_WHOLE_STEPS = {"fused_attention", "streaming", "streaming_source", "gap", "arrival"}
CARDS = ("H100", "H200", "H800", "GH200")
_PROFILED = "kernels of two H200 by torch's profiler (benchmarks/results/two_h200_rivals.json)"
_LEDGER = "exposed collectives of steps of two and four H200 by the ledger (docs/log.md)"
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
    fused_attention=Quantity(value=422, unit="TFLOP/s", source=_PROFILED + ", head dimension 128"),
    streaming=0.68,
    streaming_source=_PROFILED,
    gap=Quantity(value=7, unit="us", source=_PROFILED),
    arrival=Quantity(value=60, unit="us", source=_LEDGER),
    beside={
        "weights": Overlap(hidden=0.8, slowed=0.35, source=_LEDGER),
        "gradients": Overlap(hidden=0.3, slowed=0.35, source=_LEDGER),
        "tokens": Overlap(hidden=0.75, slowed=0.35, source=_LEDGER),
        "replicas": Overlap(hidden=0.73, slowed=0.35, source=_PROFILED),
        "keys": Overlap(hidden=0.73, slowed=0.35, source="assumption; as replicas"),
    },
)


def of_card(name: str, devices: int) -> Hardware | None:
    """The machine of ``devices`` such cards, in the nodes that torchrun says; None for others.

    Args:
        name: as CUDA has it.
        devices: ranks of the run.
    """
    if not _is_hopper(name):
        return None
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", min(devices, HOPPER.devices_per_node)))
    return HOPPER.model_copy(update={"devices": devices, "devices_per_node": per_node})


def of_whole_steps(name: str) -> dict[str, Any]:
    """Keys of a hardware file that only whole steps show, of such a card; none of others.

    Args:
        name: as CUDA has it, or with more around it.
    """
    if not _is_hopper(name):
        return {}
    return HOPPER.model_dump(include=OF_WHOLE_STEPS, exclude_defaults=True)


def _is_hopper(name: str) -> bool:
    return any(card in name for card in CARDS)

"""Machines and models that predictions are made for, and the steps that were measured."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_helix.machine import hardware
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.model import ModelConfig
from tests.script_module import script_module

MACHINES = {
    path.stem: hardware.load(path) for path in sorted(Path("configs/hardware").glob("*.yaml"))
}
DENSE = read_config(ModelConfig, Path("configs/models/dense.yaml"))
MOE = read_config(ModelConfig, Path("configs/models/moe.yaml"))
SMALL = BatchConfig(sequences=64, sequence_length=512)
SIXTEEN = MACHINES["h100_2x8_ib"]

# The dense model with heads that fused attention takes, and context parallelism with it.
NARROW = DENSE.model_copy(update={"name": "narrow", "num_attention_heads": 64, "kv_channels": 128})
# The same with fewer query groups than most degrees: stock ranks hold groups in common.
FEW = NARROW.model_copy(update={"name": "few", "num_query_groups": 2})


@cache
def benchmark() -> ModuleType:
    """``benchmarks/predictions.py``, which reads what was measured."""
    return script_module("benchmarks/predictions.py")


def multiplied(machine: Hardware, *path: str, factor: float) -> Hardware:
    """The machine with one constant multiplied."""
    document = machine.model_dump()
    place = document
    for key in path:
        place = place[key]
    place["value"] *= factor
    return Hardware.model_validate(document)


# What calibration finds, of no machine.
CALIBRATED: dict[str, Any] = {
    **{"name": "case", "ranks": 2, "devices_per_node": 2, "element_bytes": 2},
    **dict.fromkeys(("gemm", "memory", "copied"), 1e12),
    **{"links": {"intra_node": {"all_gather": (1e9, 1e-6)}}, "beside": {}},
    "core_attention": [],
}

"""Kernels of a step by kind, from a trace as torch's profiler writes it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_helix.basics.errors import UserError
from megatron_helix.recording import kernels

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "step_kernels.py"


def _event(name: str, start_us: float, us: float, category: str = "kernel") -> dict[str, Any]:
    return {"name": name, "cat": category, "ts": start_us, "dur": us, "ph": "X"}


STEP = [
    _event("nvjet_tst_128x256", 0, 4000),
    _event("ncclDevKernel_AllGather_RING", 1000, 5000),  # 2000 of them alone
    _event("Memcpy DtoD", 7000, 500, "gpu_memcpy"),
    _event("nvjet_tst_128x256", 9000, 1000),
    _event("aten::mm", 0, 9000, "cpu_op"),
]


def _written(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_a_steps_kernels_by_kind_and_what_the_gpu_was_busy_with(tmp_path: Path) -> None:
    found = kernels.read(_written(tmp_path / "rank-0.json.gz", STEP))
    assert {kind: (sum.ms, sum.calls) for kind, sum in found.kinds.items()} == {
        "NCCL": (5.0, 1),
        "GEMM": (5.0, 2),
        "copies": (0.5, 1),
    }
    assert found.names["GEMM", "nvjet_tst_128x256"].ms == 5.0
    assert (found.any_ms, found.compute_ms, found.span_ms) == (7.5, 5.5, 10.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv", "NCCL"),
        ("void transformer_engine::rmsnorm_fwd_tuned_kernel", "norm"),
        ("void fused_amax_kernel", "FP8"),
        ("_transpose", "copies"),
        ("triton_poi_fused_silu_mul", "activation"),
        ("vectorized_elementwise_kernel", "elementwise"),
        ("something_new", "others"),
    ],
)
def test_the_kind_of_a_kernel(name: str, kind: str) -> None:
    assert kernels.kind_of(name) == kind


def test_what_is_no_trace_of_a_gpu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no trace")
    with pytest.raises(UserError, match="must be a trace of torch's profiler, got JSONDecodeError"):
        kernels.read(tmp_path / "text.json")
    with pytest.raises(UserError, match="must be of a step on a GPU, got 1 events"):
        kernels.read(_written(tmp_path / "cpu.json.gz", STEP[-1:]))


def test_two_layouts_side_by_side(tmp_path: Path) -> None:
    traces = [
        _written(tmp_path / "a.json.gz", STEP),
        _written(tmp_path / "b.json.gz", [*STEP, _event("Memcpy DtoD", 20000, 700, "gpu_memcpy")]),
    ]
    command = [sys.executable, str(BENCHMARK), *map(str, traces), "--names", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in said.splitlines()]
    assert ["copies", "0.5", "1", "1.2", "2", "+0.7"] in rows
    assert ["any", "kernel", "7.5", "8.2", "+0.7"] in rows
    assert ["copies:", "Memcpy", "DtoD", "0.5", "1", "1.2", "2", "+0.7"] in rows
    assert not any("nvjet" in line for line in said.splitlines())

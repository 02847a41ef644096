"""The GPU kernels of a step by kind, read from the traces that torch's profiler writes.

Megatron writes them with ``--profile --use-pytorch-profiler`` and ``--tensorboard-dir``, gzipped,
as ``torch_profile/rank-0.json.gz`` beside it. Events are in microseconds.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.recording.profile import overlap

# The first kind whose words are in a kernel's name, in lower case; in this order.
KINDS = {
    "NCCL": ("nccl",),
    "GEMM": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk"),
    "attention": ("softmax", "flash", "fmha", "sdpa", "attention"),
    "norm": ("norm", "ln_"),
    "optimizer": ("adam", "multi_tensor"),
    "FP8": ("fp8", "quantize", "amax", "cast_transpose"),
    "copies": ("copy", "memcpy", "memset", "cat", "transpose", "permute"),
    "activation": ("gelu", "silu", "swiglu", "geglu"),
    "elementwise": ("elementwise", "triton", "reduce", "_add"),
    "others": ("",),
}
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Sum:
    """Kernels that belong together."""

    ms: float = 0.0
    calls: int = 0

    def add(self, ms: float) -> None:
        """One more."""
        self.ms, self.calls = self.ms + ms, self.calls + 1


@dataclass(frozen=True)
class Kernels:
    """What ran on a GPU in one step.

    Attributes:
        kinds: sums by kind, in the order of :data:`KINDS`.
        names: sums by (kind, kernel).
        any_ms: how long anything ran.
        compute_ms: how long anything but NCCL ran.
        span_ms: from the first kernel to the end of the last.
    """

    kinds: dict[str, Sum]
    names: dict[tuple[str, str], Sum]
    any_ms: float
    compute_ms: float
    span_ms: float


def read(path: Path) -> Kernels:
    """The kernels of a trace.

    Raises:
        UserError: for a file that is no trace, and one in which nothing ran on a GPU.
    """
    try:
        text = path.read_bytes()
        events = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: must be a trace of torch's profiler, got {type(error).__name__}: {error};"
            " Megatron writes one with --profile --use-pytorch-profiler"
        ) from None
    kernels = [event for event in events if event.get("cat") in _ON_GPU]
    if not kernels:
        raise UserError(
            f"{path}: must be of a step on a GPU, got {len(events)} events and none of a kernel;"
            " profile a rank that has a GPU"
        )
    return _summed(kernels)


def kind_of(name: str) -> str:
    """The kind of the kernel ``name``."""
    low = name.lower()
    return next(kind for kind, words in KINDS.items() if any(word in low for word in words))


def _summed(kernels: Iterable[dict[str, Any]]) -> Kernels:
    kinds: dict[str, Sum] = {kind: Sum() for kind in KINDS}
    names: dict[tuple[str, str], Sum] = {}
    spans, compute = [], []
    for kernel in kernels:
        name, start = kernel["name"], round(kernel["ts"] * 1000)
        kind, span = kind_of(name), (start, start + round(kernel["dur"] * 1000))
        kinds[kind].add(kernel["dur"] / 1000)
        names.setdefault((kind, name), Sum()).add(kernel["dur"] / 1000)
        spans.append(span)
        if kind != "NCCL":
            compute.append(span)
    return Kernels(
        kinds={kind: sum for kind, sum in kinds.items() if sum.calls},
        names=names,
        any_ms=overlap(spans, [])[0] / 1e6,
        compute_ms=overlap(compute, [])[0] / 1e6,
        span_ms=(max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6,
    )

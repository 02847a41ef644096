"""Time and memory of core attentions on one device, for ``helix calibrate`` and the benchmark.

The modules are those that layers are built of, on one rank: Megatron's groups are made for it.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.kernels.core_times import CoreTime
from megatron_helix.layers.layer_spec import CORE_ATTENTIONS
from megatron_helix.options.core_attention import able

REPEATS = 7
Call = Callable[[], Any]


class Shape(NamedTuple):
    """Of what a core attention is given.

    Attributes:
        sequences: b.
        heads: H.
        groups: K.
        length: s, of queries and keys.
        channels: d.
    """

    sequences: int
    heads: int
    groups: int
    length: int
    channels: int


# At 512 the unfused path of TransformerEngine needs 70 GB for the longest. On CPUs one is enough to
# see what a file must hold.
ON_GPU = [
    *(Shape(4, 16, 16, 2048, channels) for channels in (128, 256, 512)),
    *(Shape(1, 16, 16, 8192, channels) for channels in (128, 256, 512)),
    Shape(2, 16, 16, 4096, 512),
    Shape(1, 4, 4, 16384, 512),
]
ON_CPU = [Shape(1, 2, 2, 512, 64)]


class Taken(NamedTuple):
    """What a call took: medians of some, and the highest use of memory beside its inputs."""

    forward_ms: float
    training_ms: float
    memory_gb: float


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Megatron's groups and random states, of ranks that each work alone."""
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def spec_core() -> Any:
    """The layer spec's core attention: TransformerEngine's, where it is installed."""
    if find_spec("transformer_engine"):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return DotProductAttention


def build(kind: Any, shape: Shape, dtype: torch.dtype) -> Any:
    """A causal core attention of this class, without dropout."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.heads * shape.channels,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.channels,
        attention_dropout=0.0,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        masked_softmax_fusion=False,
    )
    return kind(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Query, key and value ``[s, b, H or K, d]``, which want gradients, and that of the output."""
    draw = torch.Generator(device=device).manual_seed(1)
    found = [
        torch.randn(
            *(shape.length, shape.sequences, count, shape.channels),
            generator=draw,
            device=device,
            dtype=dtype,
        )
        for count in (shape.heads, shape.groups, shape.groups, shape.heads)
    ]
    return [*(x.requires_grad_() for x in found[:3]), found[3].flatten(2)]


def causal_call(core: Any) -> Callable[..., torch.Tensor]:
    """``(query, key, value) -> [s, b, H * d]`` by a module."""
    return lambda q, k, v: core(q, k, v, None, attn_mask_type=AttnMaskType.causal)


def taken(
    attend: Callable[..., torch.Tensor], given: list[torch.Tensor], repeats: int = REPEATS
) -> Taken:
    """Time and memory of ``attend(query, key, value)``."""
    *qkv, grad = given
    clock = _gpu_ms if grad.is_cuda else _cpu_ms

    def train() -> None:
        torch.autograd.grad(attend(*qkv), qkv, grad)

    before = 0
    train()  # compiles
    if grad.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    train()
    peak = torch.cuda.max_memory_allocated() - before if grad.is_cuda else 0
    with torch.no_grad():
        forward = clock(lambda: attend(*qkv), repeats)
    return Taken(forward, clock(train, repeats), peak / 1e9)


def measure(device: str) -> Iterator[CoreTime]:
    """The times of a device (``cpu`` or ``cuda``), of what can be had there.

    It ran on an H200.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    source = f"{name}, {str(dtype)[6:]}, measured by helix calibrate with torch {torch.__version__}"
    for shape in ON_GPU if device == "cuda" else ON_CPU:
        given = inputs(shape, dtype, device)
        kinds = {"spec": spec_core(), **CORE_ATTENTIONS}
        for core in ("spec", *able(shape.channels, on_cpu=device == "cpu")):
            attend = causal_call(build(kinds[core], shape, dtype))
            try:
                forward, training, memory = taken(attend, given)
            except torch.OutOfMemoryError:
                continue
            yield CoreTime(
                core=core,
                channels=shape.channels,
                length=shape.length,
                rows=shape.sequences * shape.heads,
                forward_ms=round(forward, 4),
                training_ms=round(training, 4),
                memory_gb=round(memory, 3),
                source=source,
            )


def _gpu_ms(work: Call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _cpu_ms(work: Call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)

"""One core attention on one rank, built as Megatron builds it, and what goes in and comes out."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import GlobalMemoryBuffer

from tests.cpu_config import cpu_config

B, H, D = 3, 4, 16


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """What Megatron makes with its process groups, and stock attention asks for."""
    before = parallel_state._GLOBAL_MEMORY_BUFFER
    parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 1)
    try:
        yield
    finally:
        tracker.reset()
        parallel_state._GLOBAL_MEMORY_BUFFER = before


def build(cls: Any, mask_type: AttnMaskType, **options: Any) -> Any:
    """A core attention of H heads of D channels, in double precision."""
    config = cpu_config(
        **{
            **{"num_layers": 2, "hidden_size": H * D, "num_attention_heads": H},
            **{"attention_dropout": 0.0, "masked_softmax_fusion": False},
            **{"params_dtype": torch.float64, "attention_softmax_in_fp32": True},
            **options,
        }
    )
    alone = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    return cls(config, 2, mask_type, "self", pg_collection=alone)


def tensors(queries: int, keys: int, groups: int, channels: int = D) -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(queries, B, H), (keys, B, groups), (keys, B, groups)]
    return [
        torch.randn(*shape, channels, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def hidden(batch: int, queries: int, keys: int) -> torch.Tensor:
    """A mask that leaves every query something to see."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.5
    mask[..., 0] = False
    return mask


def gradients(
    core: Any, inputs: list[torch.Tensor], mask: torch.Tensor | None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """What comes out, and the gradients of what goes in and of the softmax offset, by name."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = core(*leaves, mask, **kwargs)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    names = ("query", "key", "value")
    if isinstance(core.softmax_offset, torch.nn.Parameter):
        leaves, names = [*leaves, core.softmax_offset], (*names, "offset")
    found = torch.autograd.grad(output, leaves, grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(names, found, strict=True))}

"""Where a shard's gradient is added up: in Megatron's ``main_grad``, in its precision.

Stock rounds a weight's gradient once a micro-batch, to the weight's precision, and Megatron's data
parallelism adds it to ``main_grad``, in fp32 unless it is told otherwise. The m parts of a gradient
whose tokens m ranks share out are added up there too, like so many micro-batches.

Megatron's hook behind each gradient must not add it again. Fused linears tell it so by a mark on
the parameter, and hand on a stand-in for the gradient. They leave the mark standing, as each of
them has set it by the next time. Here it comes down with the backward pass: the next micro-batch
may take another exchange, whose gradient the hook must add.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_helix.kernels import sums

Runs = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def add(
    shard: torch.nn.Parameter, parts: Sequence[torch.Tensor], runs: Runs
) -> torch.Tensor | None:
    """Add up the parts of a shard's gradient, in a backward pass.

    Args:
        shard: a parameter; without ``main_grad`` its gradient is the sum, rounded once.
        parts: ``[m, ...]`` for every run of the shard; overwritten.
        runs: the runs of a tensor like the shard, as views of it.

    Returns:
        What autograd is to hand on for the shard.
    """
    if getattr(shard, "main_grad", None) is None:
        gradient = parts[0].new_zeros(shard.shape)
        _add(runs(gradient), parts)
        return gradient
    add_up(shard, parts, runs)
    return stand_in(shard)


def accumulator(shard: Any) -> torch.Tensor:
    """Where a shard's gradients are summed: Megatron's buffer; ``grad`` without it."""
    main_grad = getattr(shard, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if shard.grad is None:
        shard.grad = torch.zeros_like(shard)
    return shard.grad


def add_up(shard: Any, parts: Sequence[torch.Tensor], runs: Runs) -> None:
    """As :func:`add`, into ``main_grad`` and nothing else."""
    _add(runs(shard.main_grad), parts)


def takes_stand_in(shard: Any) -> bool:
    """Whether Megatron's hook behind the shard's gradient can be told that it has been added."""
    return getattr(shard, "main_grad", None) is not None and hasattr(
        shard, "grad_added_to_main_grad"
    )


def stand_in(shard: Any) -> torch.Tensor | None:
    """For a gradient that goes to ``main_grad`` by itself; the hook is told for this pass."""
    if not takes_stand_in(shard):
        return None
    _mark(shard, added=True)
    at_the_end(lambda: _mark(shard, added=False))
    # The hook adds it all the same where another use of the weight hands on a true gradient.
    zero = getattr(shard, "zero_out_wgrad", False)
    return torch.zeros_like(shard) if zero else torch.empty_like(shard)


def at_the_end(call: Callable[[], None]) -> None:
    """Have the backward pass that is running call this when it is through."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def _add(accumulators: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    for accumulator, part in zip(accumulators, parts, strict=True):
        sums.add(accumulator, part)


def _mark(shard: Any, *, added: bool) -> None:
    shard.grad_added_to_main_grad = added

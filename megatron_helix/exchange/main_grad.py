"""Where a shard's gradient is added up: in Megatron's ``main_grad``, in its precision.

Stock rounds a weight's gradient once a micro-batch, to the weight's precision, and Megatron's data
parallelism adds it to ``main_grad``, in fp32 unless it is told otherwise. The m parts of a gradient
whose tokens m ranks share out are added up there too, like so many micro-batches.

Megatron's hook behind each gradient must not add it again. Fused linears tell it so by a mark on
the parameter, and hand on a stand-in for the gradient. They leave the mark standing, as each of
them has set it by the next time. Here it comes down with the backward pass: the next micro-batch
may take another exchange, whose gradient the hook must add.
"""

from typing import Any

import torch

from megatron_helix.kernels import sums


def add(shard: torch.nn.Parameter, parts: torch.Tensor, *, turned: bool) -> torch.Tensor | None:
    """Add up the parts of a shard's gradient, in a backward pass.

    Args:
        shard: a parameter; without ``main_grad`` its gradient is the sum, rounded once.
        parts: ``[m, *shard.shape]``, of matrices transposed if ``turned``; overwritten.
        turned: whether the parts are of the transposed shard.

    Returns:
        What autograd is to hand on for the shard.
    """
    main_grad: torch.Tensor | None = getattr(shard, "main_grad", None)
    if main_grad is None:
        gradient = sums.total(parts)
        return gradient.t() if turned else gradient
    sums.add(main_grad.t() if turned else main_grad, parts)
    if not hasattr(shard, "grad_added_to_main_grad"):
        return None
    _mark(shard, added=True)
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: _mark(shard, added=False))
    # The hook adds it all the same where another use of the weight hands on a true gradient.
    zero = getattr(shard, "zero_out_wgrad", False)
    return torch.zeros_like(shard) if zero else torch.empty_like(shard)


def _mark(shard: Any, *, added: bool) -> None:
    shard.grad_added_to_main_grad = added

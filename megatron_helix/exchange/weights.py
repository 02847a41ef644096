"""The ``weights`` exchange: weights move over the dim axis, tokens stay.

Tensor parallelism over T ranks gathers every token to every rank. Here the m ranks of a dim group
share out the tokens instead (see :mod:`megatron_helix.exchange.tokens`) and gather the m shards of
a weight: each works on 1/m of the tokens with the weights of its head group, and the tokens are
gathered and summed over the n ranks of the head-axis group only.

Sharded einsums of the two linears (N tokens, D hidden, F features; x is sharded over both axes by
tokens, or by tokens and features; a weight over both by features)::

    column:  y[N_m, F_n] = x[N_m, D] W[F_n, D]^T   x: all-gather over head, W: all-gather over dim
    row:     y[N_mn, D]  = x[N_m, F_n] W[D, F_n]^T  W: all-gather over dim,
                                                    y: reduce-scatter over head

Elements a rank sends: column forward ``(n-1) N D / T + (m-1) F D / T``, row the same. Backward
twice that for the weight (gathered again, its gradient summed) and, for the tokens, twice for a
column linear (input gathered again, its gradient reduce-scattered), once for a row linear.

What is saved for the backward pass is the sharded input: memory stays at 1/T of the weights and one
gathered working copy. How shards are gathered and gradients brought home is in
:mod:`megatron_helix.exchange.gathered_weight`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange import gemm
from megatron_helix.exchange.gathered_weight import Ahead, GatheredWeight
from megatron_helix.kernels.collectives import (
    UnderWay,
    gather,
    scatter_sum,
    start_gather,
    start_scatter_sum,
)


class _ColumnLinear(torch.autograd.Function):
    """Forward: all-gather x over head, the weight over dim, multiply. Saves x, sharded.

    Backward: gathers both again; input gradient reduce-scattered over head, the weight's exchanged
    over dim. Dual of :class:`_RowLinear` in its token collectives. Begun early, the gather of x
    runs beside the GEMM of the input gradient and the reduce-scatter of that beside the weight's.
    With one head group no tokens move, and the weight's gradient comes first: its exchange runs
    beside the GEMM of the input gradient. A frozen weight has no gradient, and x is not gathered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shard: torch.Tensor,
        weight: GatheredWeight,
        head: dist.ProcessGroup,
        ahead: Ahead,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.head, ctx.ahead = weight, head, ahead
        x, whole = gather(x, head), weight.whole()
        ahead.begin_forward()
        y = gemm.output(x, whole)
        ahead.begin_beyond()
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        early = ctx.weight.early
        _send(ctx.ahead.behind)
        if ctx.head.size() == 1:
            ctx.weight.start()
            ctx.ahead.begin_backward()
            shard_gradient = _begun(ctx, grad, UnderWay(x, None))
            ctx.weight.send()
            grad_x = gemm.input_gradient(grad, ctx.weight.whole())
            _settle(ctx.ahead.behind)
            return grad_x, shard_gradient(), None, None, None
        whole = ctx.weight.whole()
        ctx.ahead.begin_backward()
        trained = ctx.needs_input_grad[1]
        gathering = start_gather(x, ctx.head, early=early) if trained else UnderWay(x, None)
        grad_x = gemm.input_gradient(grad, whole)
        del whole
        summing = start_scatter_sum(grad_x, ctx.head, early=early)
        del grad_x
        shard_gradient = _begun(ctx, grad, gathering)
        _settle(ctx.ahead.behind)
        return summing.wait(), shard_gradient(), None, None, None


class _RowLinear(torch.autograd.Function):
    """Forward: all-gather the weight over dim, multiply, reduce-scatter over head. Saves x.

    Backward: output gradient all-gathered over head, weight gathered again; weight gradient
    exchanged over dim. Dual of :class:`_ColumnLinear` in its token collectives. The exchange runs
    beside the GEMM of the input gradient or, where sums may come later, behind it: beside what the
    layer does next.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shard: torch.Tensor,
        weight: GatheredWeight,
        head: dist.ProcessGroup,
        ahead: Ahead,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.head, ctx.ahead = weight, head, ahead
        whole = weight.whole()
        ahead.begin_forward()
        return scatter_sum(gemm.output(x, whole), head)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        grad = gather(grad, ctx.head)
        _send(ctx.ahead.behind)
        # One gather in front of this GEMM, the exchange in front of the other.
        ctx.weight.start()
        ctx.ahead.begin_backward()
        shard_gradient = _begun(ctx, grad, UnderWay(x, None))
        grad_x = gemm.input_gradient(grad, ctx.weight.whole())
        ctx.weight.send()
        _settle(ctx.ahead.behind)
        return grad_x, shard_gradient(), None, None, None


def _send(weight: GatheredWeight | None) -> None:
    if weight is not None:
        weight.send()


def _settle(weight: GatheredWeight | None) -> None:
    if weight is not None:
        weight.settle()


def _begun(ctx: Any, grad: torch.Tensor, x: UnderWay) -> Callable[[], torch.Tensor | None]:
    """What waits for the shard's gradient, begun or to be sent later; a frozen one has none."""
    if not ctx.needs_input_grad[1]:
        return lambda: None
    return ctx.weight.product(grad, x.wait(), later=ctx.ahead.sums_later)


def column_linear(
    x: torch.Tensor, weight: GatheredWeight, head: dist.ProcessGroup, ahead: Ahead = Ahead()
) -> torch.Tensor:
    """Column-parallel linear on 1/m of the tokens.

    Args:
        x: ``[tokens/n, ..., D]``, sharded over ``head``.
        weight: shards ``[F/T, D]`` of the head group's ``[F/n, D]``.
        head: n ranks, over which tokens are gathered.
        ahead: the weights to begin gathering while this one multiplies.

    Returns:
        ``[tokens, ..., F/n]``.
    """
    return _ColumnLinear.apply(x, weight.shard, weight, head, ahead)


def row_linear(
    x: torch.Tensor, weight: GatheredWeight, head: dist.ProcessGroup, ahead: Ahead = Ahead()
) -> torch.Tensor:
    """Row-parallel linear on 1/m of the tokens: ``[tokens, ..., F/n] -> [tokens/n, ..., D]``.

    Arguments as for :func:`column_linear`; the shards are ``[D, F/T]`` of ``[D, F/n]``.
    """
    return _RowLinear.apply(x, weight.shard, weight, head, ahead)

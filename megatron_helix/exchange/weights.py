"""The ``weights`` exchange: weights move over the dim axis, tokens stay.

Tensor parallelism over T ranks gathers every token to every rank. Here the m ranks of a dim group share
out the tokens instead (see :mod:`megatron_helix.exchange.tokens`) and gather the m shards of a weight:
each works on 1/m of the tokens with the weights of its head group, and the tokens are gathered and
summed over the n ranks of the head group only.

Sharded einsums of the two linears (N tokens, D hidden, F features; x is sharded over head group and
tokens, a weight over head group and dim group)::

    column:  y[N_m, F_n] = x[N_m, D] W[F_n, D]^T   x: all-gather over head, W: all-gather over dim
    row:     y[N_mn, D]  = x[N_m, F_n] W[D, F_n]^T  W: all-gather over dim, y: reduce-scatter over head

Elements a rank sends: column forward ``(n-1) N D / T + (m-1) F D / T``, row the same. Backward twice
that for the weight (gathered again, its gradient reduce-scattered) and, for the tokens, twice for a
column linear (input gathered again, its gradient reduce-scattered), once for a row linear.

What is saved for the backward pass are the sharded input and the weight's own shard: memory stays at
1/T of the weights and one gathered working copy.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.collectives import gather, scatter_sum


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How the shards of a dim group make the weight of a head group.

    The cut axis of the head group's weight is ``[outer, m, inner]``; a shard is one index of the middle.

    Attributes:
        axis: the dimension of the weight that is cut: 0 for a column-parallel linear, 1 for row.
        outer: runs of a shard that lie apart in the whole: 1 for a contiguous shard, 2 for a gated
            MLP (gate and up), heads times blocks for attention's tiles.
    """

    axis: int
    outer: int = 1

    def join(self, gathered: torch.Tensor, m: int) -> torch.Tensor:
        """``[m * rows, ...]``, shard after shard -> the head group's weight."""
        shards = gathered.view(m, -1, *gathered.shape[1:])
        if self.axis == 0:
            runs = shards.view(m, self.outer, -1, *shards.shape[2:])
            return runs.transpose(0, 1).reshape(gathered.shape)  # a view where outer is 1
        runs = shards.view(m, shards.size(1), self.outer, -1)
        return runs.permute(1, 2, 0, 3).reshape(shards.size(1), -1)

    def part(self, whole: torch.Tensor, m: int) -> torch.Tensor:
        """The head group's weight -> ``[m * rows, ...]``, shard after shard; inverse of `join`."""
        if self.axis == 0:
            runs = whole.view(self.outer, m, -1, *whole.shape[1:])
            return runs.transpose(0, 1).reshape(whole.shape)
        runs = whole.view(whole.size(0), self.outer, m, -1)
        return runs.permute(2, 0, 1, 3).reshape(m * whole.size(0), -1)


class _ColumnLinear(torch.autograd.Function):
    """Forward: all-gather x over head, the weight over dim, multiply. Saves both shards.

    Backward: gathers both again; input gradient reduce-scattered over head, weight gradient over dim.
    Dual of :class:`_RowLinear` in its token collectives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        shards: Shards,
        head: dist.ProcessGroup,
        dim: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shards, ctx.head, ctx.dim = shards, head, dim
        return gather(x, head) @ shards.join(gather(weight, dim), dim.size()).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        m = ctx.dim.size()
        grad_x = scatter_sum(grad @ ctx.shards.join(gather(weight, ctx.dim), m), ctx.head)
        whole = grad.flatten(0, -2).t() @ gather(x, ctx.head).flatten(0, -2)
        grad_weight = scatter_sum(ctx.shards.part(whole, m), ctx.dim)
        return grad_x, grad_weight, None, None, None


class _RowLinear(torch.autograd.Function):
    """Forward: all-gather the weight over dim, multiply, reduce-scatter over head. Saves x, shard.

    Backward: output gradient all-gathered over head, weight gathered again; weight gradient
    reduce-scattered over dim. Dual of :class:`_ColumnLinear` in its token collectives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        shards: Shards,
        head: dist.ProcessGroup,
        dim: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shards, ctx.head, ctx.dim = shards, head, dim
        return scatter_sum(x @ shards.join(gather(weight, dim), dim.size()).t(), head)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        m = ctx.dim.size()
        grad = gather(grad, ctx.head)
        grad_x = grad @ ctx.shards.join(gather(weight, ctx.dim), m)
        whole = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        grad_weight = scatter_sum(ctx.shards.part(whole, m), ctx.dim)
        return grad_x, grad_weight, None, None, None


def column_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    shards: Shards,
    *,
    head: dist.ProcessGroup,
    dim: dist.ProcessGroup,
) -> torch.Tensor:
    """Column-parallel linear on 1/m of the tokens.

    Args:
        x: ``[tokens/n, ..., D]``, sharded over ``head``.
        weight: this rank's shard ``[F/T, D]``.
        shards: how the dim group's shards make the head group's weight.
        head: n ranks, over which tokens are gathered.
        dim: m ranks, over which the weight is gathered.

    Returns:
        ``[tokens, ..., F/n]``.
    """
    return _ColumnLinear.apply(x, weight, shards, head, dim)


def row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    shards: Shards,
    *,
    head: dist.ProcessGroup,
    dim: dist.ProcessGroup,
) -> torch.Tensor:
    """Row-parallel linear on 1/m of the tokens: ``[tokens, ..., F/n] -> [tokens/n, ..., D]``.

    Arguments as for :func:`column_linear`; ``weight`` is ``[D, F/T]``.
    """
    return _RowLinear.apply(x, weight, shards, head, dim)

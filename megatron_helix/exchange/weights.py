"""The ``weights`` exchange: weights move over the dim axis, tokens stay.

Tensor parallelism over T ranks gathers every token to every rank. Here the m ranks of a dim group
share out the tokens instead (see :mod:`megatron_helix.exchange.tokens`) and gather the m shards of
a weight: each works on 1/m of the tokens with the weights of its head group, and the tokens are
gathered and summed over the n ranks of the head group only.

Sharded einsums of the two linears (N tokens, D hidden, F features; x is sharded over head group and
tokens, a weight over head group and dim group)::

    column:  y[N_m, F_n] = x[N_m, D] W[F_n, D]^T   x: all-gather over head, W: all-gather over dim
    row:     y[N_mn, D]  = x[N_m, F_n] W[D, F_n]^T  W: all-gather over dim,
                                                    y: reduce-scatter over head

Elements a rank sends: column forward ``(n-1) N D / T + (m-1) F D / T``, row the same. Backward
twice that for the weight (gathered again, its gradient reduce-scattered) and, for the tokens, twice
for a column linear (input gathered again, its gradient reduce-scattered), once for a row linear.

What is saved for the backward pass is the sharded input: memory stays at 1/T of the weights and one
gathered working copy. :class:`StepWeight` trades memory for traffic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.collectives import (
    UnderWay,
    gather,
    scatter_sum,
    start_gather,
    start_scatter_sum,
)
from megatron_helix.copies import contiguous, packed
from megatron_helix.exchange import gemm


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How the shards of a dim group make the weight of a head group.

    The cut axis of the head group's weight is ``[outer, m, inner]``; a shard is one index of the
    middle. Shards travel with that axis first: a shard that is cut by columns is transposed before
    it is sent, 1/m of the copying that the gathered weight would need, and what arrives is whole
    rows of the transposed weight, which a GEMM reads as they are.

    Attributes:
        axis: the dimension of the weight that is cut: 0 for a column-parallel linear, 1 for row.
        outer: runs of a shard that lie apart in the whole: 1 for a contiguous shard, 2 for a gated
            MLP (gate and up), heads times blocks for attention's tiles.
    """

    axis: int
    outer: int = 1

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with the cut axis first, or back; a view."""
        return weight.t() if self.axis else weight

    def join(self, gathered: torch.Tensor, m: int) -> torch.Tensor:
        """``[m * rows, ...]``, turned shard after shard -> the head group's weight.

        A view where ``outer`` is 1.
        """
        runs = gathered.view(m, self.outer, -1, *gathered.shape[1:])
        return self.turned(packed(runs.transpose(0, 1)).view(gathered.shape))

    def part(self, whole: torch.Tensor, m: int) -> torch.Tensor:
        """The head group's weight -> ``[m * rows, ...]``, shard after shard; inverse of `join`."""
        whole = self.turned(whole)
        runs = whole.view(self.outer, m, -1, *whole.shape[1:])
        return contiguous(runs.transpose(0, 1)).view(whole.shape)


class GatheredWeight:
    """The head group's weight, from the shards of a dim group, gathered whenever it is needed.

    On a GPU :meth:`start` lets the gather run beside the GEMM before; nothing is begun early on the
    CPU, where a collective would take the cores that compute.

    Args:
        shard: this rank's parameter.
        shards: how the shards make the whole.
        dim: the m ranks that hold them.
    """

    _coming: UnderWay | None = None

    def __init__(self, shard: torch.nn.Parameter, shards: Shards, dim: dist.ProcessGroup):
        self.shard, self.shards, self.dim = shard, shards, dim
        self.early = runs_beside_compute(shard)

    def start(self) -> None:
        """Begin the gather that the next :meth:`whole` waits for."""
        if self.early and self._coming is None:
            self._coming = self._start()

    def whole(self) -> torch.Tensor:
        """The head group's weight, ``[F/n, D]`` or ``[D, F/n]``; one all-gather over dim."""
        coming, self._coming = self._coming or self._start(), None
        return self.shards.join(coming.wait(), self.dim.size())

    def gradient(self, whole: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """Begin the reduce-scatter over dim of the whole weight's gradient.

        Returns:
            What waits for it and gives the shard's gradient, for autograd.
        """
        parts = self.shards.part(whole, self.dim.size())
        del whole  # the caller keeps none either: one copy less while they are exchanged
        summing = start_scatter_sum(parts, self.dim, early=self.early)
        return lambda: self.shards.turned(summing.wait())

    def _start(self) -> UnderWay:
        return start_gather(self.shards.turned(self.shard.detach()), self.dim, early=self.early)


def runs_beside_compute(shard: torch.Tensor) -> bool:
    """Whether a collective on ``shard`` is worth beginning before its result is needed."""
    return shard.device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The weight that the pass will need after this one's, as far as that is certain.

    Every rank of a dim group must come to the same answer: a gather begun is a collective.
    """

    forward: GatheredWeight | None = None
    backward: GatheredWeight | None = None


class StepWeight(GatheredWeight):
    """Gathered once a step and kept over its micro-batches, as is the sum of their gradients.

    The traffic of tensor parallelism n with data parallelism m and a distributed optimizer, for 1/n
    of the weights (and of their gradients, in the dtype of ``main_grad``) in memory while a step
    lasts. :meth:`finish` must be called when the last micro-batch of a step is through; Megatron's
    ``finalize_model_grads_func`` is the place.
    """

    _kept: torch.Tensor | None = None
    _sum: torch.Tensor | None = None

    def start(self) -> None:
        """As for the parent, unless the whole weight is there."""
        if self._kept is None:
            super().start()

    def whole(self) -> torch.Tensor:
        """As for the parent, on the first call of a step; the kept one on the others."""
        if self._kept is None:
            self._kept = super().whole()
        return self._kept

    def gradient(self, whole: torch.Tensor) -> Callable[[], None]:
        """Add to the step's sum; no communication, and nothing yet for the shard."""
        if self._sum is None:
            self._sum = torch.zeros_like(whole, dtype=self._accumulator.dtype)
        self._sum.add_(whole)
        return lambda: None

    def finish(self) -> None:
        """Add this step's gradient to the shard's and forget the whole; one reduce-scatter."""
        if self._sum is not None:
            parts = self.shards.part(self._sum, self.dim.size())
            self._accumulator.add_(self.shards.turned(scatter_sum(parts, self.dim)))
        self._kept = self._sum = None

    @property
    def _accumulator(self) -> torch.Tensor:
        """Where the shard's gradients are summed: Megatron's buffer; ``grad`` without DDP."""
        main_grad = getattr(self.shard, "main_grad", None)
        if main_grad is not None:
            return main_grad
        if self.shard.grad is None:
            self.shard.grad = torch.zeros_like(self.shard)
        return self.shard.grad


class _ColumnLinear(torch.autograd.Function):
    """Forward: all-gather x over head, the weight over dim, multiply. Saves x, sharded.

    Backward: gathers both again; input gradient reduce-scattered over head, weight gradient over
    dim. Dual of :class:`_RowLinear` in its token collectives. Begun early, the gather of x runs
    beside the GEMM of the input gradient and the reduce-scatter of that beside the weight's. With
    one head group no tokens move, and the weight's gradient comes first: its reduce-scatter runs
    beside the GEMM of the input gradient.
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
        _start(ahead.forward)
        return gemm.output(x, whole)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        early = ctx.weight.early
        if ctx.head.size() == 1:
            ctx.weight.start()
            _start(ctx.ahead.backward)
            shard_gradient = ctx.weight.gradient(gemm.weight_gradient(grad, x))
            grad_x = gemm.input_gradient(grad, ctx.weight.whole())
            return grad_x, shard_gradient(), None, None, None
        whole = ctx.weight.whole()
        _start(ctx.ahead.backward)
        gathering = start_gather(x, ctx.head, early=early)
        grad_x = gemm.input_gradient(grad, whole)
        del whole
        summing = start_scatter_sum(grad_x, ctx.head, early=early)
        del grad_x
        shard_gradient = ctx.weight.gradient(gemm.weight_gradient(grad, gathering.wait()))
        return summing.wait(), shard_gradient(), None, None, None


class _RowLinear(torch.autograd.Function):
    """Forward: all-gather the weight over dim, multiply, reduce-scatter over head. Saves x.

    Backward: output gradient all-gathered over head, weight gathered again; weight gradient
    reduce-scattered over dim. Dual of :class:`_ColumnLinear` in its token collectives. Begun early,
    the reduce-scatter runs beside the GEMM of the input gradient.
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
        _start(ahead.forward)
        return scatter_sum(gemm.output(x, whole), head)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        grad = gather(grad, ctx.head)
        # Of the transposed weight, dW^T = X^T dY, for that is how its shards travel.
        shard_gradient = ctx.weight.gradient(gemm.weight_gradient(x, grad).t())
        whole = ctx.weight.whole()
        _start(ctx.ahead.backward)
        grad_x = gemm.input_gradient(grad, whole)
        return grad_x, shard_gradient(), None, None, None


def _start(weight: GatheredWeight | None) -> None:
    if weight is not None:
        weight.start()


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

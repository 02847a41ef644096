"""The weight of a head group, gathered from the m shards of a dim group; its gradient, back again.

Sharded einsum (a weight ``[F, D]``, cut over head group and dim group; tokens over the dim group)::

    W[F_mn, D]  -> W[F_n, D]      all-gather over dim, whenever the whole is needed
    dW[F_n, D]_m -> dW[F_mn, D]   all-to-all over dim of the parts, each from 1/m of the tokens

The gradient of a shard is the sum of m parts. A reduce-scatter would round it at every hop: the
parts are exchanged as they are, which sends as many bytes, and added up where stock adds up
micro-batches (:mod:`megatron_helix.exchange.main_grad`).

Nothing gathered is kept; :class:`StepWeight` trades memory for traffic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange import main_grad
from megatron_helix.kernels.collectives import UnderWay, scatter_sum, start_exchange, start_gather
from megatron_helix.kernels.copies import joined, parted


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How the shards of a dim group make the weight of a head group.

    The cut axis of the head group's weight is ``[outer, m, inner]``; a shard is one index of the
    middle. Where the m are not alike, a shard has zeros behind the shorter ones, which the whole is
    without. Shards travel with that axis first: a shard that is cut by columns is transposed before
    it is sent, 1/m of the copying that the gathered weight would need, and what arrives is whole
    rows of the transposed weight, which a GEMM reads as they are.

    Attributes:
        axis: the dimension of the weight that is cut: 0 for a column-parallel linear, 1 for row.
        outer: runs of a shard that lie apart in the whole: 1 for a contiguous shard, 2 for a gated
            MLP (gate and up), heads times blocks for attention's tiles.
        runs: lengths of the m inner axes; none where they are alike.
    """

    axis: int
    outer: int = 1
    runs: tuple[int, ...] = ()

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with the cut axis first, or back; a view."""
        return weight.t() if self.axis else weight

    def join(self, gathered: torch.Tensor, m: int) -> torch.Tensor:
        """``[m * rows, ...]``, turned shard after shard -> the head group's weight.

        A view where ``outer`` is 1.
        """
        runs = gathered.view(m, self.outer, -1, *gathered.shape[1:])
        lengths = self.runs or (runs.size(2),) * m
        return self.turned(joined(runs, lengths, dim=1).flatten(0, 1))

    def part(self, whole: torch.Tensor, m: int) -> torch.Tensor:
        """The head group's weight -> ``[m, rows, ...]``, its turned shards; inverse of `join`."""
        whole = self.turned(whole)
        runs = whole.view(self.outer, -1, *whole.shape[1:])
        lengths = self.runs or (runs.size(1) // m,) * m
        return parted(runs, lengths, dim=1).flatten(1, 2)


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
        """Begin to exchange the parts of the whole weight's gradient over dim.

        Returns:
            What waits for them, adds them up and gives the shard's gradient, for autograd.
        """
        parts = self.shards.part(whole, self.dim.size())
        del whole  # the caller keeps none either: one copy less while they are exchanged
        coming = start_exchange(parts, self.dim, early=self.early)
        turned = self.shards.axis == 1
        return lambda: main_grad.add(self.shard, coming.wait(), turned=turned)

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
        """Add this step's gradient to the shard's and forget the whole; one reduce-scatter.

        In the precision of ``main_grad``, as data parallelism would.
        """
        whole, self._kept, self._sum = self._sum, None, None
        if whole is not None:
            parts = self.shards.part(whole, self.dim.size())
            del whole
            summed = scatter_sum(parts.flatten(0, 1), self.dim)
            self._accumulator.add_(self.shards.turned(summed))

    @property
    def _accumulator(self) -> torch.Tensor:
        """Where the shard's gradients are summed: Megatron's buffer; ``grad`` without DDP."""
        main_grad = getattr(self.shard, "main_grad", None)
        if main_grad is not None:
            return main_grad
        if self.shard.grad is None:
            self.shard.grad = torch.zeros_like(self.shard)
        return self.shard.grad


class _Whole(torch.autograd.Function):
    """Forward: all-gather the shards over dim. Backward: the parts exchanged and added up."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, weight: GatheredWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.whole()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return ctx.weight.gradient(grad.contiguous())(), None


def whole(weight: GatheredWeight) -> torch.Tensor:
    """The head group's weight, with its gradient: for what is no linear."""
    return _Whole.apply(weight.shard, weight)

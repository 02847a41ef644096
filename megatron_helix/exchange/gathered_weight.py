"""The weight of a head group, gathered from the m shards of a dim group; its gradient, back again.

The gradient of a shard is the sum of m parts. A reduce-scatter would round it at every hop: the
parts are exchanged as they are, which sends as many bytes, and added up where stock adds up
micro-batches (:mod:`megatron_helix.exchange.main_grad`).

Nothing gathered is kept, unless it is told to: memory for traffic. Then it is whole from its first
use in a step to the step's end. :mod:`megatron_helix.exchange.step_sums` keeps gradients as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange import gemm, main_grad
from megatron_helix.exchange import shards as order
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.step_sums import StepSums
from megatron_helix.kernels.collectives import UnderWay, Works, start_exchanges, start_gathers


class GatheredWeight:
    """The head group's weight, from the shards of a dim group, gathered whenever it is needed.

    On a GPU :meth:`start` lets the gather run beside the GEMM before; nothing is begun early on the
    CPU, where a collective would take the cores that compute.

    Args:
        shard: this rank's parameter.
        shards: how the shards make the whole.
        dim: the m ranks that hold them.
        home: the same ranks, over which gradients go; ``dim`` by default. NCCL's kernels of one
            group wait for each other, so that a gather would wait for gradients before it.

    Attributes:
        keeps: whether what is gathered is kept until :meth:`forget`.
        sums: where gradients are kept for a step, if they are: then none of them goes home.
    """

    keeps = False
    sums: StepSums | None = None
    _kept: torch.Tensor | None = None
    _coming: UnderWay | None = None
    _leaves: Callable[[], None] | None = None
    _sums_up: Callable[[], None] | None = None

    def __init__(
        self,
        shard: torch.nn.Parameter,
        shards: Shards,
        dim: dist.ProcessGroup,
        home: dist.ProcessGroup | None = None,
    ):
        self.shard, self.shards, self.dim, self.home = shard, shards, dim, home or dim
        self.early = order.runs_beside_compute(shard)

    def start(self) -> None:
        """Begin the gather that the next :meth:`whole` waits for."""
        start_together([self])

    @property
    def may_start(self) -> bool:
        """Whether a gather can be begun: on a GPU, with none under way and nothing kept."""
        return self.early and self._coming is None and self._kept is None

    def whole(self) -> torch.Tensor:
        """The head group's weight, ``[F/n, D]`` or ``[D, F/n]``; one all-gather over dim."""
        if self._kept is not None:
            return self._kept.detach()
        coming, self._coming = self._coming or _gathers([self])[0], None
        whole = self.shards.join(coming.wait(), self.dim.size())
        if self.keeps:
            self._kept = whole.detach()
        return whole

    def forget(self) -> None:
        """Let go of what was kept: the parameter is about to change."""
        self._kept = None

    def empty(self, whole: torch.Tensor) -> None:
        """Free the memory of what :meth:`whole` gave, for whoever must keep the tensor."""
        whole.data = whole.new_empty(0)

    def gradient(self, whole: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """Begin to exchange the parts of the whole weight's gradient over dim.

        Returns:
            What waits for them, adds them up and gives the shard's gradient, for autograd.
        """
        if self.sums is not None:
            self.sums.add(whole)
            return lambda: None
        parts = self.shards.parts(whole, self.dim.size())
        del whole  # the caller keeps none either: one copy less while they are exchanged
        coming, runs = self._exchange(parts), self.shards.runs
        return lambda: main_grad.add(self.shard, [run.wait() for run in coming], runs)

    def gradient_later(self, whole: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`gradient`, but later: :meth:`send` begins it, :meth:`settle` adds the parts up.

        Returns:
            What autograd is to hand on for the shard.
        """
        self.settle()
        if self.sums is not None or not main_grad.takes_stand_in(self.shard):
            return self.gradient(whole)()
        parts = self.shards.parts(whole, self.dim.size())
        del whole

        def leave() -> None:
            coming, runs = self._exchange(parts), self.shards.runs
            self._sums_up = lambda: main_grad.add_up(
                self.shard, [run.wait() for run in coming], runs
            )

        self._leaves = leave
        main_grad.at_the_end(self.settle)
        return main_grad.stand_in(self.shard)

    def product(
        self, grad: torch.Tensor, x: torch.Tensor, *, later: bool
    ) -> Callable[[], torch.Tensor | None]:
        """:meth:`gradient` of ``dY^T X``, or :meth:`gradient_later` of it."""
        if self.sums is not None:
            self.sums.add_product(grad, x)
            return lambda: None
        # Of a row linear transposed, dW^T = X^T dY, for that is how its shards travel.
        columns = self.shards.axis == 1
        factors = (x, grad) if columns else (grad, x)
        whole = gemm.weight_gradient(*factors)
        whole = whole.t() if columns else whole
        if not later:
            return self.gradient(whole)
        found = self.gradient_later(whole)
        return lambda: found

    def send(self) -> None:
        """Begin to exchange a gradient that is to go later: in front of a GEMM that hides it."""
        leaves, self._leaves = self._leaves, None
        if leaves is not None:
            leaves()

    def settle(self) -> None:
        """Add up a gradient that is still on its way; at the latest when the pass ends."""
        self.send()
        sums_up, self._sums_up = self._sums_up, None
        if sums_up is not None:
            sums_up()
        if self.sums is not None:
            self.sums.settle()

    def _exchange(self, parts: Sequence[torch.Tensor]) -> Sequence[UnderWay]:
        return start_exchanges(parts, self.home, early=self.early)

    def _sent(self) -> torch.Tensor:
        """What of the shard is gathered, in its shape."""
        return self.shard.detach()


def start_together(weights: Sequence[GatheredWeight]) -> None:
    """Begin the gathers of weights of one dim group, on a GPU in one kernel.

    Ranks meet once for all of them: NCCL's kernel for one weight alone lasts two to four times as
    long as its transfer, for ranks come to it one after the other.
    """
    waiting = [weight for weight in weights if weight.may_start]
    for weight, coming in zip(waiting, _gathers(waiting), strict=True):
        weight._coming = coming


def _gathers(weights: Sequence[GatheredWeight]) -> list[UnderWay]:
    """The shards of each under way, run by run: ``[apart, m, ...]`` once waited for."""
    if not weights:
        return []
    runs = [weight.shards.runs(weight._sent()) for weight in weights]
    dim, early = weights[0].dim, weights[0].early
    wholes = [each[0].new_empty(len(each), dim.size(), *each[0].shape) for each in runs]
    into = [place.flatten(0, 1) for whole in wholes for place in whole]
    works = iter(start_gathers([run for each in runs for run in each], dim, early=early, into=into))
    return [UnderWay(whole, Works([next(works) for _ in whole])) for whole in wholes]


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The weights that come after this one's in either pass, as far as that is certain.

    Every rank of a dim group must come to the same answer: a gather begun is a collective.

    Attributes:
        forward: used next in the forward pass, to begin gathering for, together.
        bias: of the next one.
        beyond: used after that one, whose GEMM is too short to hide the gather: to begin behind
            this one's.
        backward: used next in the backward pass, the same.
        behind: used before this one in the backward pass, its gradient perhaps on its way.
        sums_later: whether a gradient may be added up after autograd has handed on a stand-in.
    """

    forward: Sequence[GatheredWeight] = ()
    bias: GatheredWeight | None = None
    beyond: GatheredWeight | None = None
    backward: Sequence[GatheredWeight] = ()
    behind: GatheredWeight | None = None
    sums_later: bool = False

    def begin_forward(self) -> None:
        """Begin to gather what the next linears of a forward pass need."""
        start_together(self.forward)
        if self.bias is not None:
            self.bias.start()

    def begin_beyond(self) -> None:
        """Begin what its own predecessor cannot hide."""
        if self.beyond is not None:
            self.beyond.start()

    def begin_backward(self) -> None:
        """The same of a backward pass."""
        start_together(self.backward)


class _Whole(torch.autograd.Function):
    """Forward: all-gather the shards over dim. Backward: the parts exchanged and added up."""

    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, weight: GatheredWeight, sums_later: bool
    ) -> torch.Tensor:
        ctx.weight, ctx.sums_later = weight, sums_later
        return weight.whole()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        weight, grad = ctx.weight, grad.contiguous()
        if not ctx.sums_later:
            return weight.gradient(grad)(), None, None
        gradient = weight.gradient_later(grad)
        weight.send()
        return gradient, None, None


def whole(weight: GatheredWeight, *, sums_later: bool = False) -> torch.Tensor:
    """The head group's weight, with its gradient: for what is no linear.

    Args:
        weight: gathered now.
        sums_later: whether its gradient may be added up when the backward pass is through.
    """
    return _Whole.apply(weight.shard, weight, sums_later)

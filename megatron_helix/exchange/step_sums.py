"""The sums of a weight's gradients over the micro-batches of a step, for ``--helix-gather step``.

Of the whole weight's gradient a rank adds its own shard's part up where stock would, in
``main_grad``. What belongs to the m - 1 others' shards it keeps, in the same precision, and sends
once a step: the traffic of data parallelism over the dim group with a distributed optimizer.

A product ``dY^T X`` need not be made whole for that: a shard's part of it is that of some columns
of dY, or of X, which a GEMM adds to where it is summed.
"""

import torch
import torch.distributed as dist

from megatron_helix.exchange import gemm, main_grad
from megatron_helix.exchange import shards as order
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.traffic import COPIES
from megatron_helix.kernels import sums
from megatron_helix.kernels.collectives import UnderWay, start_sends


class StepSums:
    """Of one parameter. :meth:`finish` must be called when the last micro-batch is through.

    Megatron's ``finalize_model_grads_func`` is the place. On a GPU what is the others' is sent with
    the last gradient of a step, beside the backward pass that goes on. Which is the last, the step
    before tells: as many gradients as it had. Where more come after all, they are sums of their
    own, and come home when the step is finished.

    Args:
        shard: this rank's parameter.
        shards: how the m shards make the whole.
        home: the m ranks.
    """

    _of_others: torch.Tensor | None = None  # [m - 1, *shard], in rank order
    _coming: UnderWay | None = None
    _gradients = 0
    _of_last_step = 0

    def __init__(self, shard: torch.nn.Parameter, shards: Shards, home: dist.ProcessGroup) -> None:
        self.shard, self.shards, self.home = shard, shards, home
        self.early = order.runs_beside_compute(shard)

    def add(self, whole: torch.Tensor) -> None:
        """Add a gradient of the whole weight."""
        parts = self.shards.parts(whole, self.home.size())
        for rank, of_rank in enumerate(self._sums()):
            for run, part in zip(self.shards.runs(of_rank), parts, strict=True):
                run += part[rank]
        self._added()

    def add_product(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``dY^T X``, of ``[..., F]`` and ``[..., D]``; in FP8 where both are.

        Shard by shard, but for uneven ones, and where a factor's features would have to be copied
        and are too many: a gradient of the whole is less to move.
        """
        cut, other = (grad, x) if self.shards.axis == 0 else (x, grad)
        factor = gemm.Factor(cut)
        size = self.shard.numel() * self.home.size()
        copied = factor.matrix.numel() if self.shards.copies_features else 0
        whole = not self.shards.alike or copied > COPIES * size
        if whole and not factor.in_float8:
            self.add(gemm.weight_gradient(grad, x))
            return
        features = self.shards.features(factor.matrix, self.home.size(), factor.dim)
        for of_rank, of_its_runs in zip(self._sums(), features, strict=True):
            for place, some in zip(self.shards.places(of_rank), of_its_runs, strict=True):
                pair = (factor.of(some), other) if cut is grad else (other, factor.of(some))
                gemm.add_weight_gradient(place, *pair)
        self._added()

    def settle(self) -> None:
        """Add what has come home to the shard's gradient."""
        coming, self._coming = self._coming, None
        if coming is not None:
            sums.add(main_grad.accumulator(self.shard), coming.wait())

    def finish(self) -> None:
        """Bring what is left of a step home."""
        self.settle()
        self._send()
        self.settle()
        self._gradients, self._of_last_step = 0, self._gradients

    def _sums(self) -> list[torch.Tensor]:
        """Where each rank's part is added up, shaped as its shard."""
        own, rank = main_grad.accumulator(self.shard), self.home.rank()
        if self._of_others is None:
            self._of_others = own.new_zeros(self.home.size() - 1, *own.shape)
        others = self._of_others.unbind()
        return [*others[:rank], own, *others[rank:]]

    def _added(self) -> None:
        self._gradients += 1
        if self.early and self._gradients == self._of_last_step:
            self._send()

    def _send(self) -> None:
        of_others, self._of_others = self._of_others, None
        if of_others is not None:
            self._coming = start_sends(of_others, self.home, early=self.early)

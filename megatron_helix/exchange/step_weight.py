"""A weight and the sum of its gradients, kept for a step, as ``--helix-gather step`` has them."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_helix.exchange.shards import GatheredWeight
from megatron_helix.kernels.collectives import scatter_sum


class StepWeight(GatheredWeight):
    """Gathered once a step and kept over its micro-batches, as is the sum of their gradients.

    The traffic of tensor parallelism n with data parallelism m and a distributed optimizer, for 1/n
    of the weights (and of their gradients, in the dtype of ``main_grad``) in memory while a step
    lasts. :meth:`finish` must be called when the last micro-batch of a step is through; Megatron's
    ``finalize_model_grads_func`` is the place.
    """

    keeps = True
    _sum: torch.Tensor | None = None

    def trained(self) -> torch.Tensor:
        """:meth:`whole`, a parameter whose ``main_grad`` is the step's sum, unless frozen."""
        whole: Any = self.whole()
        if self.shard.requires_grad:
            whole.requires_grad_()
            whole.main_grad = self.sum()
        return whole

    def gradient(self, whole: torch.Tensor) -> Callable[[], None]:
        """Add to the step's sum; no communication, and nothing yet for the shard."""
        self.sum().add_(whole)
        return lambda: None

    def gradient_later(self, whole: torch.Tensor) -> None:
        """As :meth:`gradient`."""
        self.gradient(whole)

    def sum(self) -> torch.Tensor:
        """Where a step's gradients of the whole weight are summed, like :meth:`whole` in memory."""
        if self._sum is None:
            self._sum = torch.zeros_like(self.whole(), dtype=self._accumulator.dtype)
        return self._sum

    def finish(self) -> None:
        """Add this step's gradient to the shard's and forget the whole; one reduce-scatter.

        In the precision of ``main_grad``, as data parallelism would.
        """
        self.forget()
        whole, self._sum = self._sum, None
        if whole is None:
            return
        parts = self.shards.parts(whole, self.dim.size())
        del whole
        for run, part in zip(self.shards.runs(self._accumulator), parts, strict=True):
            run.add_(scatter_sum(part.flatten(0, 1), self.dim))

    @property
    def _accumulator(self) -> torch.Tensor:
        """Where the shard's gradients are summed: Megatron's buffer; ``grad`` without DDP."""
        main_grad = getattr(self.shard, "main_grad", None)
        if main_grad is not None:
            return main_grad
        if self.shard.grad is None:
            self.shard.grad = torch.zeros_like(self.shard)
        return self.shard.grad

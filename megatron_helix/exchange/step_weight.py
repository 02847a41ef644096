"""A weight and the sum of its gradients, kept for a step, as ``--helix-gather step`` has them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_helix.exchange.shards import GatheredWeight
from megatron_helix.kernels.collectives import UnderWay, start_scatter_sums


class StepWeight(GatheredWeight):
    """Gathered once a step and kept over its micro-batches, as is the sum of their gradients.

    The traffic of tensor parallelism n with data parallelism m and a distributed optimizer, for 1/n
    of the weights (and of their gradients, in the dtype of ``main_grad``) in memory while a step
    lasts. :meth:`finish` must be called when the last micro-batch of a step is through; Megatron's
    ``finalize_model_grads_func`` is the place.

    On a GPU the reduce-scatter begins with the last gradient of a step, beside the backward pass
    that goes on. Which is the last, the step before tells: as many gradients as it had. Where more
    come after all, they are a sum of their own, and come home when the step is finished.
    """

    keeps = True
    _sum: torch.Tensor | None = None
    _lent: Any = None
    _returning: Sequence[UnderWay] = ()
    _gradients = 0
    _of_last_step = 0

    def trained(self, behind: GatheredWeight | None = None) -> torch.Tensor:
        """:meth:`whole`, a parameter whose gradient goes to the step's sum, unless frozen.

        TransformerEngine asks a parameter of Megatron-FSDP's for its ``main_grad`` when there is a
        gradient for it, so does it here: sums grow as activations are given up.

        Args:
            behind: used before this weight in the backward pass, its gradients to be settled.
        """
        if self._lent is None:
            lent: Any = self.whole().detach()
            if self.shard.requires_grad:
                lent.requires_grad_()
                lent.__fsdp_param__ = True
                lent.get_main_grad = self.sum
                lent.grad_added_to_main_grad = False
                lent.register_post_accumulate_grad_hook(lambda lent: self._after(lent, behind))
            self._lent = lent
        return self._lent

    def _after(self, lent: torch.Tensor, behind: GatheredWeight | None) -> None:
        lent.grad = None  # a stand-in
        if behind is not None:
            behind.settle()
        self._added()

    def gradient(self, whole: torch.Tensor) -> Callable[[], None]:
        """Add to the step's sum; nothing yet for the shard."""
        self.sum().add_(whole)
        self._added()
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
        self.settle()
        if self._sum is not None:
            self._return()
            self.settle()
        self.forget()
        self._gradients, self._of_last_step = 0, self._gradients

    def forget(self) -> None:
        """As for the parent."""
        super().forget()
        self._lent = None

    def settle(self) -> None:
        """Add what has come home to the shard's gradient."""
        returning, self._returning = self._returning, ()
        if returning:
            for run, part in zip(self.shards.runs(self._accumulator), returning, strict=True):
                run.add_(part.wait())

    def _added(self) -> None:
        self._gradients += 1
        if self.early and self._gradients == self._of_last_step:
            self._return()

    def _return(self) -> None:
        whole, self._sum = self._sum, None
        assert whole is not None
        parts = [part.flatten(0, 1) for part in self.shards.parts(whole, self.dim.size())]
        self._returning = start_scatter_sums(parts, self.home, early=self.early)

    @property
    def _accumulator(self) -> torch.Tensor:
        """Where the shard's gradients are summed: Megatron's buffer; ``grad`` without DDP."""
        main_grad = getattr(self.shard, "main_grad", None)
        if main_grad is not None:
            return main_grad
        if self.shard.grad is None:
            self.shard.grad = torch.zeros_like(self.shard)
        return self.shard.grad

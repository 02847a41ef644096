"""A shard that TransformerEngine's own linears gather, multiply and send the gradient of.

TransformerEngine's ``pytorch/distributed_weight.py`` says what a weight must have for that: a
tensor whose forward and backward matrices are asked for, and which is handed the gradient of the
whole. Nothing of TransformerEngine is imported here: the protocol is structural.

What its modules take for granted, and what is done for it:

* GEMMs read rows, whatever the strides say: a matrix that is handed over is contiguous.
* Input and output are measured by ``weight.shape[-1]``: a shard that is cut by columns is shown as
  ``[D/m, F/n]``, the same memory.
* ``LayerNormLinear`` asks the gathered matrix whether it is trained, and keeps it with its context
  until the backward pass: what was handed over is emptied when the forward pass is through it.
"""

from typing import Any

import torch

from megatron_helix.exchange.gathered_weight import Ahead, GatheredWeight


class DistributedShard(torch.Tensor):
    """The shard of a head group's weight, as one forward pass and its backward pass use it.

    Attributes:
        is_distributed_weight: the mark of the protocol.
    """

    is_distributed_weight = True
    # What is computed of it is a plain tensor.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    _forward: GatheredWeight
    _backward: GatheredWeight
    _ahead: Ahead
    _handed: torch.Tensor | None = None

    @staticmethod
    def of(
        forward: GatheredWeight, backward: GatheredWeight, ahead: Ahead = Ahead()
    ) -> "DistributedShard":
        """The shard of ``forward``, with gradients.

        Args:
            forward: gathers what the forward GEMM reads.
            backward: gathers what the GEMM of the input gradient reads, and sends the weight's
                gradient home; of the same shard, often the same.
            ahead: the weights to begin gathering while this one multiplies.
        """
        shard: torch.Tensor = forward.shard
        if forward.shards.axis == 1:
            shard = shard.view(shard.size(0) // forward.dim.size(), -1)
        shown = shard.as_subclass(DistributedShard)
        shown._forward, shown._backward, shown._ahead = forward, backward, ahead
        return shown

    def materialize_group_for_forward(self) -> torch.Tensor:
        """The head group's weight, ``[out, in]``, for ``x W^T``."""
        whole = self._forward.whole()
        self._ahead.begin_forward()
        self._handed = self._to_hand(whole)
        return self._handed

    def materialize_group_for_backward(self) -> torch.Tensor:
        """The head group's weight once more, for ``dY W``."""
        whole = self._backward.whole()
        if self._ahead.behind is not None:
            self._ahead.behind.send()
        self._ahead.begin_backward()
        return self._to_hand(whole)

    def finalize_group_grads(self, wgrads: torch.Tensor) -> torch.Tensor | None:
        """Send the parts of the whole weight's gradient home; what autograd is to hand on."""
        if self._ahead.behind is not None:
            self._ahead.behind.settle()
        weight = self._backward
        send = weight.gradient_later if self._ahead.sums_later else _at_once(weight)
        gradient = send(wgrads)
        return None if gradient is None else gradient.view(self.shape)

    def take_factors(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        """:meth:`finalize_group_grads` where gradients are kept for a step: of ``dY^T X``."""
        if self._ahead.behind is not None:
            self._ahead.behind.settle()
        self._backward.product(grad, x, later=False)

    def grad_buffer(self) -> torch.Tensor:
        """Not for gradients that are sent in the weight's own precision."""
        raise NotImplementedError(
            "the weight gradient of a gathered weight is not fused; leave fuse_wgrad_accumulation"
        )

    def release(self) -> None:
        """Empty what was handed over for the forward pass, which may be kept beyond it."""
        handed, self._handed = self._handed, None
        if handed is not None:
            self._forward.empty(handed)

    def _to_hand(self, whole: torch.Tensor) -> torch.Tensor:
        # A tensor of its own: what it is a view of would keep the memory beyond `release`.
        handed = whole.detach() if type(whole) is torch.Tensor else whole
        return handed.requires_grad_(self.requires_grad)


class FactorStore:
    """Where TransformerEngine's modules leave the factors of a weight's gradient.

    They have a ``WeightGradStore`` for pipelines that put those GEMMs off, and hand it input and
    output gradient in place of a product. Here they are multiplied at once, into sums of parts.

    Attributes:
        shard: the weight of the forward pass that the store is of.
        wanted: whether factors are to be left.
    """

    shard: DistributedShard
    wanted = False

    def delay_wgrad_compute(self) -> bool:
        """Whether factors are to be left, as TransformerEngine asks."""
        return self.wanted

    def put(self, factors: list[torch.Tensor], gemm: Any) -> None:
        """Take (input, output gradient); TransformerEngine's own product is not wanted."""
        del gemm
        self.shard.take_factors(*factors)


def _at_once(weight: GatheredWeight) -> Any:
    return lambda whole: weight.gradient(whole)()

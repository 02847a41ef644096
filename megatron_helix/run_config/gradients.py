"""In which precision gradients are added up over micro-batches, and sent."""

from dataclasses import dataclass
from typing import Literal

from megatron_helix.run_config.precision import ELEMENT_BYTES, Precision

Kind = Literal["fp32", "fp16", "bf16", "auto"]


@dataclass(frozen=True, kw_only=True)
class GradientFlags:
    """Megatron's flags that choose it, under their names; without any it is what Megatron takes.

    Data parallelism adds gradients up in fp32 in bf16, and in the weights' precision in fp16 and
    fp32; it sends what it has added up. Sharded weights' gradients have the weights' precision: of
    torch FSDP2 always (no mixed-precision policy), of Megatron FSDP unless told otherwise.

    Attributes:
        grad_reduce_in_bf16: in bf16 as bf16; Megatron reads it in bf16 alone.
        accumulate_allreduce_grads_in_fp32: in fp16 as fp32; bf16 does so by itself.
        main_grads_dtype: of the precision-aware optimizer; bf16 narrows them in bf16.
        megatron_fsdp_main_grads_dtype: in which Megatron FSDP adds up.
        megatron_fsdp_grad_comm_dtype: in which it sends; auto is what it adds up in.
    """

    grad_reduce_in_bf16: bool = False
    accumulate_allreduce_grads_in_fp32: bool = False
    main_grads_dtype: Kind = "fp32"
    megatron_fsdp_main_grads_dtype: Kind = "auto"
    megatron_fsdp_grad_comm_dtype: Kind = "auto"

    def summed_bytes(self, precision: Precision, fsdp: str | None) -> int:
        """Of an element of the gradient that micro-batches are added up in.

        Args:
            precision: of weights.
            fsdp: the layout's kind of it.
        """
        asked = self.megatron_fsdp_main_grads_dtype
        if fsdp == "megatron_fsdp" and asked != "auto":
            return ELEMENT_BYTES[asked]
        return ELEMENT_BYTES["fp32" if not fsdp and self._widens(precision) else precision]

    def sent_bytes(self, precision: Precision, fsdp: str | None) -> int:
        """The same of a gradient as data-parallel ranks send it."""
        asked = self.megatron_fsdp_grad_comm_dtype
        if fsdp == "megatron_fsdp" and asked != "auto":
            return ELEMENT_BYTES[asked]
        return self.summed_bytes(precision, fsdp)

    def _widens(self, precision: Precision) -> bool:
        """Whether data parallelism adds up in fp32: Megatron's rules, in their order."""
        if precision == "bf16" and self.grad_reduce_in_bf16:
            return False
        if precision == "bf16" and self.main_grads_dtype == "fp32":
            return True
        return self.accumulate_allreduce_grads_in_fp32

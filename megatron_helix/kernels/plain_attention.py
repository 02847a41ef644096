"""What core attentions have in common whose kernels do causal and full attention and no more."""

from typing import Any, ClassVar

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.core_attention import OWN

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


class PlainAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters; ``forward`` is a subclass's.

    Attributes:
        core: value of ``--helix-core-attention``, for messages and its head dimensions.

    Raises:
        UserError: for dropout, windows, softmax offsets and other head dimensions.
    """

    core: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        channels, own = self.hidden_size_per_attention_head, OWN[self.core]
        taken = own.channels is None or channels in own.channels
        lacking = {
            "--attention-dropout": self.attention_dropout.p,
            "--window-size": self.scale_mask_softmax.window_size,
            "--softmax-type": None if self.softmax_offset is None else self.config.softmax_type,
            "--kv-channels": None if taken else channels,
        }
        for flag, value in lacking.items():
            if value:
                raise UserError(
                    f"{flag}: {self.core}'s kernels have no dropout, window or softmax offset and"
                    f" take {own.channels_said} channels, got {value}; use another"
                    " --helix-core-attention"
                )

    def is_causal(
        self, mask: Any, mask_type: AttnMaskType | None, bias: Any, packed_seq_params: Any
    ) -> bool:
        """Whether causal attention is asked for; if not it is full.

        A mask is not looked at where the type is causal: as with TransformerEngine, it is the
        causal one that Megatron's data loader makes.

        Args:
            mask: None, or the causal one.
            mask_type: the layer's own by default.
            bias: refused.
            packed_seq_params: refused.

        Raises:
            UserError: for other masks, packed sequences and attention biases.
        """
        causal = (mask_type or self.attn_mask_type) in _CAUSAL
        if (mask is not None and not causal) or bias is not None or packed_seq_params is not None:
            raise UserError(
                f"--helix-core-attention: {self.core} takes neither a mask that is not causal, nor"
                " packed sequences, nor an attention bias; leave the flag away"
            )
        return causal

    @property
    def whole_scale(self) -> float:
        """Of scores: Megatron divides by the layer's number in the product, multiplies after it."""
        return self.softmax_scale * float(self.scale_mask_softmax.scale or 1)

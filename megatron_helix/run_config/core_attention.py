"""The core attentions of ``--helix-core-attention``: names, and what each of them can do.

Without torch: flags, layouts and the planner read it. The classes are in ``CORE_ATTENTIONS`` of
:mod:`megatron_helix.layers.layer_spec`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

CoreAttention = Literal["spec", "prefix", "flex", "ffpa", "auto"]
NAMES: tuple[CoreAttention, ...] = get_args(CoreAttention)


@dataclass(frozen=True, kw_only=True)
class Own:
    """A core attention that stands in for the layer spec's.

    Attributes:
        said: what it is, for ``--help``; it continues the name.
        fused: whether the scores stay on the chip at head dimensions where the spec's do not.
        skips: whether a piece of late queries costs it no more than what they see.
        dropout: whether it drops scores.
        plain: whether it does causal and full attention alone: no windows, softmax offsets and
            masks of documents.
        channels: head dimensions that it has kernels for; None for all.
        on_cpu: whether a CPU trains with it.
        half: whether its kernels are of half precision alone.
    """

    said: str
    fused: bool
    skips: bool = False
    dropout: bool = False
    plain: bool = False
    channels: range | None = None
    on_cpu: bool = True
    half: bool = False

    @property
    def channels_said(self) -> str:
        """``channels`` in words."""
        sizes = self.channels
        return "any number of" if sizes is None else f"{sizes.start} to {sizes[-1]}"


OWN: dict[str, Own] = {
    "prefix": Own(
        said="multiplies pieces of the queries with the keys that they see, for head dimensions"
        " without a fused kernel",
        fused=False,
        dropout=True,
    ),
    "flex": Own(
        said="is torch's FlexAttention, which keeps scores out of memory",
        fused=True,
        skips=True,
        on_cpu=False,
    ),
    "ffpa": Own(
        said="is the attention of the package ffpa-attn, which does so, too",
        fused=True,
        skips=True,
        plain=True,
        channels=range(320, 513),  # ffpa-attn 0.2.4's for sm_90
        on_cpu=False,
        half=True,
    ),
}

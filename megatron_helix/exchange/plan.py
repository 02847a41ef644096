"""How one block exchanges: what ``auto`` or the flags decide, and linears and attention obey."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What moves over the dim axis, which tokens a rank takes, and how often weights are gathered.

    Attributes:
        exchange: ``activations``, ``weights`` or ``scores``; ``partials`` in a decode step on a
            cache that is split by position (:mod:`megatron_helix.exchange.decode`).
        split: ``batch`` or ``sequence``; ``none`` for scores.
        gather: ``microbatch``, ``once`` or ``step``; of meaning for ``weights`` only.
        balanced: whether a sequence split deals out pieces of equal causal work
            (:mod:`megatron_helix.exchange.tokens`), or the chunks as the stream has them.
        documents: where those of a packed row begin and end, ``(0, ..., s)``; none where rows are
            not packed.
    """

    exchange: str
    split: str
    gather: str = "microbatch"
    balanced: bool = True
    documents: tuple[int, ...] = ()

    @property
    def keeps_weights(self) -> bool:
        """Whether gathered weights are kept for a step."""
        return self.exchange == "weights" and self.gather != "microbatch"

    @property
    def keeps_gradients(self) -> bool:
        """Whether their gradients are too, summed over the micro-batches."""
        return self.exchange == "weights" and self.gather == "step"

    @property
    def dealing(self) -> dict[str, Any]:
        """What decides, beside layout and length, which tokens of a sequence a rank takes."""
        return {"balanced": self.balanced, "documents": self.documents}

    @property
    def has_own_order(self) -> bool:
        """Whether the stream inside the block is in another order than stock's."""
        return self.exchange == "weights" and (self.split == "batch" or self.balanced)

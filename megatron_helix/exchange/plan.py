"""How one block exchanges: what ``auto`` or the flags decide, and linears and attention obey."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What moves over the dim axis, which tokens a rank takes, and how often weights are gathered.

    Attributes:
        exchange: ``activations``, ``weights`` or ``scores``; ``partials`` in a decode step on a
            cache that is split by position (:mod:`megatron_helix.exchange.decode`).
        split: ``batch`` or ``sequence``; ``none`` for scores.
        gather: ``microbatch`` or ``step``; of meaning for ``weights`` only.
    """

    exchange: str
    split: str
    gather: str = "microbatch"

"""Features of an MLP, dealt out to ranks that need not divide them.

Rank r of T has the floor or the ceiling of F / T features, the first ranks the longer shares, and
stores them as the longer one: a share that is one shorter ends in a feature of zeros. Stored, the F
features are ``padded(F, T)``, of which Megatron's own linears cut T equal shards. (Filling up at
the very end instead would be as simple, but leaves the last ranks without any feature where F is
not much larger than T.)

A projection is one of the matrices whose rows are features: a gated MLP's first linear holds two,
gate and up, one behind the other on every rank.
"""

from itertools import pairwise

from megatron_helix.basics.errors import UserError


def padded(features: int, parts: int) -> int:
    """Features as ``parts`` ranks store them together, the next multiple."""
    return -(-features // parts) * parts


def waste(features: int, parts: int) -> float:
    """Stored zeros beside every real feature, of parameters and of operations alike."""
    return padded(features, parts) / features - 1


def shares(features: int, parts: int) -> list[range]:
    """The real features of each rank."""
    shorter, longer_ones = divmod(features, parts)
    ends = [rank * shorter + min(rank, longer_ones) for rank in range(parts + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def places(features: int, parts: int, projections: int = 1) -> list[int]:
    """Where each canonical feature of each projection is in the whole padded weight, ascending."""
    whole = padded(features, parts)
    share = whole // parts
    return [
        projection * whole + rank * share + place
        for projection in range(projections)
        for rank, mine in enumerate(shares(features, parts))
        for place in range(len(mine))
    ]


def require_features(name: str, features: int, parts: int) -> None:
    """Check that every rank has a feature.

    Raises:
        UserError: where there are fewer than ranks.
    """
    if features < parts:
        raise UserError(
            f"{name}: must be at least the {parts} ranks that share it, got {features};"
            f" use {parts} or more"
        )

"""The dealing of features as arithmetic: for every count and every number of ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix.partition.features import padded, places, require_features, shares, waste

parts = st.integers(1, 16)
counts = st.integers(16, 400)


@given(counts, parts)
def test_shares_are_all_features_in_order_and_differ_by_one(features: int, parts: int) -> None:
    dealt = shares(features, parts)
    assert [one for share in dealt for one in share] == list(range(features))
    sizes = {len(share) for share in dealt}
    assert max(sizes) - min(sizes) == (features % parts > 0)
    assert padded(features, parts) == max(sizes) * parts
    assert 0 <= waste(features, parts) < parts / features


@given(counts, parts, st.integers(1, 2))
def test_every_feature_has_a_place_on_its_rank(features: int, parts: int, projections: int) -> None:
    whole = padded(features, parts)
    share = whole // parts
    found = iter(places(features, parts, projections))
    for projection in range(projections):
        for rank, mine in enumerate(shares(features, parts)):
            first = projection * whole + rank * share
            assert [next(found) for _ in mine] == list(range(first, first + len(mine)))


def test_an_even_dealing_is_the_order_itself() -> None:
    assert places(12, 4, 2) == list(range(24))
    assert waste(12, 4) == 0


def test_a_rank_without_a_feature_is_refused() -> None:
    require_features("--ffn-hidden-size", 5, 5)
    message = (
        r"^--ffn-hidden-size: must be at least the 5 ranks that share it, got 4; use 5 or more"
    )
    with pytest.raises(ValueError, match=message):
        require_features("--ffn-hidden-size", 4, 5)

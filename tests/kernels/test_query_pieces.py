"""How queries are cut: every query in one piece, with all that it sees, and little else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix.kernels.query_pieces import Sight, computed, cut, hidden_edges

CAUSAL = Sight(left=None, right=0)


def sees(sight: Sight, query: int, key: int) -> bool:
    left = sight.left is None or key >= query - sight.left
    return left and (sight.right is None or key <= query + sight.right)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    gap=st.integers(0, 9),
    left=st.one_of(st.none(), st.integers(0, 50)),
    right=st.one_of(st.none(), st.integers(0, 12)),
    least=st.integers(1, 24),
)
def test_a_piece_has_all_that_its_queries_see(
    lengths: list[int], gap: int, left: int | None, right: int | None, least: int
) -> None:
    runs, position = [], 0
    for length in lengths:
        runs.append((position + gap, length))
        position += gap + length
    sight, queries = Sight(left=left, right=right), [p + i for p, n in runs for i in range(n)]
    pieces = cut(runs, position, sight, least=least)
    rows = [row for piece in pieces for row in range(position)[piece.rows]]
    assert rows == list(range(len(queries)))
    for piece in pieces:
        mine = queries[piece.rows]
        assert mine == list(range(piece.position, piece.position + piece.length))
        edges = {key for first, last in hidden_edges(piece, sight) for key in range(first, last)}
        assert edges <= set(range(piece.start, piece.end))
        for key in range(position):
            visible = [sees(sight, query, key) for query in mine]
            if piece.start <= key < piece.end:
                assert all(visible) or key in edges
            else:
                assert not any(visible)


@pytest.mark.parametrize(
    ("length", "pieces"), [(256, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 8), (16384, 8)]
)
def test_eight_pieces_at_most_of_512_queries_at_least(length: int, pieces: int) -> None:
    found = cut([(0, length)], length, CAUSAL)
    assert len(found) == pieces
    assert computed(found) * 2 * pieces == length**2 * (pieces + 1)


def test_a_window_needs_no_more_than_an_eighth_beside_it() -> None:
    found = cut([(0, 32768)], 32768, Sight(left=8191, right=0))
    assert computed(found) < 32768 * 8192 * 1.15

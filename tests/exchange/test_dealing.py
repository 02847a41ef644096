"""How packed rows are dealt: every token once, as many a rank of every chunk, the work balanced."""

import random
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, count, cycle, islice, pairwise, repeat

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_helix.exchange import tokens
from megatron_helix.exchange.dealing import Run, _pairs, causal_work, deal
from tests.covering import covering
from tests.exchange.test_tokens import layout_of


def ends_of(lengths: Iterator[int], row: int) -> tuple[int, ...]:
    """Where documents of these lengths end in a row; the last one is cut."""
    ends = [0]
    while ends[-1] < row:
        ends.append(min(ends[-1] + next(lengths), row))
    return tuple(ends)


def positions(runs: tuple[Run, ...]) -> list[int]:
    """Of the row, what a rank takes."""
    return [position for run in runs for position in range(run.start, run.end)]


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """m, n, and where the documents of a row end."""
    m, n = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    row = m * n * draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    return m, n, ends_of(chain(lengths, repeat(row)), row)


@given(rows())
def test_every_rank_has_as_many_tokens_of_every_chunk(
    row: tuple[int, int, tuple[int, ...]],
) -> None:
    m, n, ends = row
    tokens_in_all = ends[-1]
    dealt = deal(layout_of(m, n), ends)
    assert sorted(chain(*map(positions, dealt))) == list(range(tokens_in_all))
    for runs in dealt:
        mine = positions(runs)
        assert mine == sorted(mine)
        chunks = [position * n // tokens_in_all for position in mine]
        assert [chunks.count(i) for i in range(n)] == [tokens_in_all // (m * n)] * n
        for run in runs:
            document = next(pair for pair in pairwise(ends) if pair[0] <= run.start < pair[1])
            assert run.document == document[0]
            assert run.end <= document[1]
        assert not any(a.end == b.start and a.document == b.document for a, b in pairwise(runs))


@given(rows())
def test_no_rank_has_much_more_work_than_the_mean(row: tuple[int, int, tuple[int, ...]]) -> None:
    m, n, ends = row
    work = causal_work(layout_of(m, n), ends)
    keys = [position + 1 for start, end in pairwise(ends) for position in range(end - start)]
    assert sum(work) == sum(keys)
    assert max(work) - sum(work) / m <= 2 * max(keys)


@given(st.integers(2, 8), st.integers(0, 50), st.integers(1, 200))
def test_shares_of_a_part_differ_by_the_work_of_its_last_token(m: int, p: int, tokens: int) -> None:
    part = Run(p, p + tokens, 0)
    pairs = _pairs(part, m, [*range(tokens % m)], [0] * m)
    work = [sum(run.work for run in pair) for _, pair in pairs]
    assert sum(work) == part.work
    assert max(work) - min(work) <= p + tokens


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9))
def test_a_row_of_one_document_is_dealt_as_one_that_is_not_packed(m: int, n: int, of: int) -> None:
    layout, row = layout_of(m, n), m * n * of
    for segment, runs in enumerate(deal(layout, (0, row))):
        stock = tokens.chunk_positions(layout, segment, row)
        assert torch.equal(torch.tensor(positions(runs)), stock)


LENGTHS: dict[str, Callable[[int], Iterator[int]]] = {
    "equal": lambda row: repeat(64),
    "equal, of a prime": lambda row: repeat(61),
    "short": lambda row: repeat(3),
    "one token": lambda row: repeat(1),
    "one document": lambda row: repeat(row),
    "one long among many, first": lambda row: chain([row // 2 + 1], repeat(5)),
    "one long among many, last": lambda row: chain([3] * (row // 6), repeat(row)),
    "one long among many, between": lambda row: chain([3] * (row // 9), [row // 2 + 3], repeat(1)),
    "longer and longer": lambda row: count(1),
    "log-normal": lambda row: lognormal(1.5),
    "log-normal, wide": lambda row: lognormal(2.5),
}


def lognormal(sigma: float) -> Iterator[int]:
    """Lengths whose logarithm is normal, of median 55."""
    drawn = random.Random(7)
    return (1 + int(drawn.lognormvariate(4, sigma)) for _ in count())


SHAPES = ((2, 1), (2, 2), (3, 2), (4, 1), (4, 4), (8, 2), (16, 1))


@pytest.mark.parametrize(
    ("lengths", "m", "n"), covering((of, *cut) for of in LENGTHS for cut in SHAPES)
)
def test_largest_over_mean(lengths: str, m: int, n: int) -> None:
    """Of rows of 64 tokens or more for each segment."""
    for of_segment in (64, 257, 1000):
        row = m * n * -(-of_segment // n)
        ends = ends_of(LENGTHS[lengths](row), row)
        work = causal_work(layout_of(m, n), ends)
        assert max(work) * m / sum(work) <= 1.1, (ends, work)


@st.composite
def long_rows(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """m from 2 to 8, n, and the ends of a row of 128 m tokens or more: one document may be long."""
    m, n = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    row = m * n * draw(st.integers(-(-128 // n), -(-160 // n)))
    short = draw(st.lists(st.integers(1, draw(st.sampled_from([1, 3, 40]))), min_size=1))
    before = draw(st.integers(0, row // 2))
    lengths = chain(islice(cycle(short), before), [draw(st.integers(1, row))], cycle(short))
    return m, n, ends_of(lengths, row)


@settings(max_examples=50)
@given(long_rows())
@example((8, 1, (0, 30, *range(31, 1025))))  # of 30 tokens one is much of a rank's work
@example((5, 2, (0, 60, *range(61, 641))))
def test_one_long_document_among_others_is_balanced(
    row: tuple[int, int, tuple[int, ...]],
) -> None:
    m, n, ends = row
    work = causal_work(layout_of(m, n), ends)
    assert max(work) * m / sum(work) <= 1.1, (ends, work)


def test_whole_chunks_of_documents_do_not_do() -> None:
    """What the dealing is for: an unpacked row's pieces, of documents that are not alike."""
    layout, ends = layout_of(4, 1), (0, 129, *accumulate(repeat(1, 127), initial=130))
    keys = [p + 1 for start, end in pairwise(ends) for p in range(end - start)]
    plain = [
        sum(keys[position] for position in tokens.chunk_positions(layout, j, 256).tolist())
        for j in range(4)
    ]
    assert max(plain) * 4 / sum(plain) > 1.5
    dealt = causal_work(layout, ends)
    assert max(dealt) * 4 / sum(dealt) < 1.05

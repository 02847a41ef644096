"""How a row of packed documents is dealt over the dim axis: as many tokens each, as much work each.

A row of s tokens is n chunks of s/n, and in every chunk each of the m dim ranks takes s/T tokens,
as of an unpacked row (:mod:`megatron_helix.exchange.tokens`). A token at position p of its document
attends to p + 1 keys; what is dealt out evenly is their number, of all chunks together.

Of every document the part in a chunk is cut into 2m pieces, and a rank takes piece k and piece 2m -
1 - k: early and late, so that the sum of a pair's positions is the same for every k. Context
parallelism of Megatron and TransformerEngine cuts documents so, and has them padded to a multiple
of 2 CP. Here nothing is padded. Of the l tokens of a part, ``l mod 2m`` are left over: m of them
lengthen every late piece by one, the rest one early piece each of as many ranks, where a token has
least work. Parts are dealt in the order of their last positions, those first with which most work
is at stake; the ranks to be lengthened are those of the chunk that were least often, then those
with least work so far; and of the pairs of a part, the one with most work goes to the rank with the
least so far.

Counts: as those lengthened least often come first, they are never apart by more than one, and as m
divides the chunk, they end up equal.

Work: the shares of one part differ by no more than the work of its last token. With ``q = l // 2m``
and c early pieces a token longer, pair k of a part that begins at position p of its document has
``p + (2k + 1) q + k + 1`` more than if nothing were left over if ``k < c``, and ``c q`` more if
not; where late pieces are longer, it has ``k (2q + 1)`` less than pair 0; and ``2mq + c <= l``. A
part's largest share goes to the rank that had least, so that differences of parts cancel rather
than add up: the tests hold ``largest - mean <= 2 L``, L the longest document, over rows drawn at
random. The mean of a row of s tokens is at least ``(L^2 / 2 + s - L) / m``, so the largest is at
most 1.1 times the mean in every row of ``(20 m + 1)^2 / 2`` tokens or more (13,000 at m = 8),
whatever its documents. Of rows drawn at random, with a long document among short ones, that is so
from 128 m tokens on.

A row of one document is dealt as an unpacked one.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from megatron_helix.partition.layout import HelixLayout

# Queries of one call of a fused kernel that aligns them at the end of their keys. It computes the
# rectangle of both (cuDNN does, seen on H200): half the square of the queries for nothing. Each
# call more reads the keys once more, and adds their gradients up once more.
QUERIES = 2048


class Run(NamedTuple):
    """Neighbouring tokens of one document, on one rank.

    Attributes:
        start: of the row, the first token.
        end: of the row, the one after the last.
        document: of the row, the first token of their document.
    """

    start: int
    end: int
    document: int

    @property
    def work(self) -> int:
        """Keys that its tokens attend to, causally."""
        first, last = self.start - self.document + 1, self.end - self.document
        return (first + last) * (self.end - self.start) // 2


class _Part(NamedTuple):
    """What of a document lies in one chunk."""

    chunk: int
    run: Run


@lru_cache(maxsize=16)
def deal(layout: HelixLayout, ends: tuple[int, ...]) -> tuple[tuple[Run, ...], ...]:
    """The runs of every dim rank, in the order of the row.

    Args:
        layout: the partition.
        ends: where documents begin and end, ``(0, ..., s)``, ascending; T divides s.
    """
    m, chunk = layout.m, ends[-1] // layout.n
    parts = [
        _Part(i, Run(max(start, i * chunk), min(end, (i + 1) * chunk), start))
        for start, end in pairwise(ends)
        for i in range(start // chunk, (end - 1) // chunk + 1)
    ]
    lengthened = [[0] * m for _ in range(layout.n)]
    work = [0] * m
    runs: list[list[Run]] = [[] for _ in range(m)]
    for i, whole in sorted(parts, key=lambda part: part.run.document - part.run.end):
        often = lengthened[i]
        left_over = (whole.end - whole.start) % m
        chosen = sorted(range(m), key=lambda j: (often[j], work[j], j))[:left_over]
        for j in chosen:
            often[j] += 1
        alone = whole.end - whole.start == chunk
        for j, pair in list(_pairs(whole, m, chosen, None if alone else work)):
            runs[j] += pair
            work[j] += sum(run.work for run in pair)
    return tuple(tuple(joined(sorted(mine))) for mine in runs)


def _pairs(
    whole: Run, m: int, chosen: list[int], work: list[int] | None
) -> Iterator[tuple[int, list[Run]]]:
    """The pairs of pieces of one part, each with the rank that takes it.

    The early pieces of ``chosen`` ranks are a token longer. The pairs go by the ranks' numbers, or
    the heavier, the less ``work`` a rank has.
    """
    short, over = divmod(whole.end - whole.start, 2 * m)
    late = short + (over >= m)
    start, end, pairs = whole.start, whole.end, []
    for k in range(m):
        early = short + (k < len(chosen))
        pair = [Run(start, start + early, whole.document), Run(end - late, end, whole.document)]
        pairs.append([run for run in pair if run.end > run.start])
        start, end = start + early, end - late
    others = [j for j in range(m) if j not in chosen]
    for ranks, theirs in (chosen, pairs[: len(chosen)]), (others, pairs[len(chosen) :]):
        if work is not None:
            ranks = sorted(ranks, key=lambda j: (work[j], j))
            theirs = sorted(theirs, key=lambda pair: -sum(run.work for run in pair))
        yield from zip(ranks, theirs, strict=True)


def joined(runs: list[Run]) -> list[Run]:
    """The runs, ascending; neighbours of one document as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].end == run.start and found[-1].document == run.document:
            found[-1] = found[-1]._replace(end=run.end)
        else:
            found.append(run)
    return found


def causal_work(layout: HelixLayout, ends: tuple[int, ...]) -> list[int]:
    """Keys that the tokens of each dim rank attend to, causally, in one row."""
    return [sum(run.work for run in mine) for mine in deal(layout, ends)]

"""Which pieces of a sequence a rank of the dim axis takes, and how much of them it has already.

Why these pieces: :mod:`megatron_helix.exchange.tokens`.
"""

from typing import NamedTuple

from megatron_helix.exchange.dealing import deal
from megatron_helix.exchange.plan import Plan
from megatron_helix.partition.layout import HelixLayout


class Piece(NamedTuple):
    """Neighbouring tokens of a sequence.

    Attributes:
        start: position of the first one.
        length: how many; 1 or more.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.length


def _pair(m: int, segment: int, length: int) -> list[Piece]:
    """Pieces ``segment`` and ``2m - 1 - segment`` of m chunks of ``length`` tokens.

    Of an odd length the m early pieces have a token less than the m late ones.
    """
    early = length // 2
    late = length - early
    found = [
        Piece(segment * early, early),
        Piece(m * early + (m - 1 - segment) * late, late),
    ]
    return [piece for piece in found if piece.length]


def pieces(
    layout: HelixLayout,
    segment: int,
    sequence: int,
    *,
    balanced: bool = True,
    documents: tuple[int, ...] = (),
) -> list[Piece]:
    """What dim rank ``segment`` attends for, in the order of the sequence: ``s/m`` tokens.

    Balanced, a sequence of ``documents`` (as `Plan` has them) is dealt document by document.
    """
    if balanced and documents:
        runs = deal(layout, documents)[segment]
        return [Piece(run.start, run.end - run.start) for run in runs]
    m, length = layout.m, sequence // layout.size
    chunk = _pair(m, segment, length) if balanced else [Piece(segment * length, length)]
    starts = range(0, sequence, m * length)
    return [Piece(start + piece.start, piece.length) for start in starts for piece in chunk]


def kept(plan: Plan, layout: HelixLayout, rank: int, sequence: int) -> int:
    """Tokens of chunk ``rank`` of T, as the stream has them, that its own rank attends for.

    The rest of its ``sequence / T`` tokens goes to other ranks when the stream is dealt out.
    """
    length = sequence // layout.size
    start, end = rank * length, (rank + 1) * length
    _, segment = layout.coordinates(rank)
    mine = pieces(layout, segment, sequence, **plan.dealing)
    return sum(max(0, min(piece.end, end) - max(piece.start, start)) for piece in mine)

"""Queries cut into pieces, each with the keys that some query of it sees.

A causal piece needs keys up to its own end only: c equal pieces of a sequence compute
``(c + 1) / 2c`` of the square of scores, of which half is needed. With a sliding window a piece
needs the keys of its window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

LEAST = 512  # queries of a piece: of fewer, products run far below a GPU's rate
MOST = 8  # pieces that see one key: 16 would save 3 % more, and round its gradient 16 times
ALIGNED = 8  # elements of half precision that tensor cores load at once


class Sight(NamedTuple):
    """How far a query sees, itself included.

    Attributes:
        left: keys before it; None for all.
        right: keys behind it; None for all. 0 is causal.
    """

    left: int | None
    right: int | None


class Piece(NamedTuple):
    """Neighbouring queries, and the keys that they need.

    Attributes:
        first: row of the first query.
        length: how many.
        position: of the first query in the sequence of keys.
        start: the first key.
        end: behind the last key.
    """

    first: int
    length: int
    position: int
    start: int
    end: int

    @property
    def rows(self) -> slice:
        """Of the queries."""
        return slice(self.first, self.first + self.length)

    @property
    def keys(self) -> int:
        """How many."""
        return self.end - self.start


def cut(
    runs: Sequence[tuple[int, int]],
    keys: int,
    sight: Sight,
    *,
    least: int = LEAST,
    most: int = MOST,
) -> list[Piece]:
    """The pieces of some queries, in order.

    A piece has an eighth (``most``) of what a query sees at most, but not less than 512 (``least``)
    queries, and no run is joined to another.

    Args:
        runs: (position, length) of neighbouring queries, as they lie in memory, ascending.
        keys: number of them.
        sight: how far a query sees.
        least: queries of a piece, where a run has them.
        most: pieces that see one key.
    """
    reach = keys if sight.left is None else min(keys, sight.left + 1)
    shortest = max(least, -(-reach // most))
    found: list[Piece] = []
    for position, length in runs:
        count = max(1, length // shortest)
        size = -(-length // count)
        size = -(-size // ALIGNED) * ALIGNED
        for offset in range(0, length, size):
            first = found[-1].first + found[-1].length if found else 0
            own = min(size, length - offset)
            found.append(Piece(first, own, *_seen(position + offset, own, keys, sight)))
    return found


def _seen(position: int, length: int, keys: int, sight: Sight) -> tuple[int, int, int]:
    """Position, first key and the one behind the last of a piece."""
    start = 0 if sight.left is None else max(0, position - sight.left) // ALIGNED * ALIGNED
    end = keys if sight.right is None else min(keys, position + length + sight.right)
    return position, start, end


def hidden_edges(piece: Piece, sight: Sight) -> Iterator[tuple[int, int]]:
    """Ranges of keys of which some query of the piece does not see all; the others need no mask."""
    if sight.right is not None and (right := piece.position + sight.right + 1) < piece.end:
        yield max(right, piece.start), piece.end
    if sight.left is not None:
        left = piece.position + piece.length - 1 - sight.left
        if left > piece.start:
            yield piece.start, min(left, piece.end)


def computed(pieces: Sequence[Piece]) -> int:
    """Scores that are computed for one head."""
    return sum(piece.length * piece.keys for piece in pieces)

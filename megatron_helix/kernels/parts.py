"""Pieces of queries in parts of the heads: what is computed at once, so in memory at once.

A part is some heads of some sequences, and all queries of its piece. Smaller parts take less memory
and more time: 8 sequences of 2048, 16 heads of 512, take 4.9 ms and 2.01 GB in 4 pieces undivided,
5.0 ms and 1.88 GB in these parts (one H200, one call, training); parts of 2^25 scores took 6.0 ms.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_helix.kernels.query_pieces import Piece

SCORES = 2**26  # that a part has at most: 128 MiB in half precision
KEPT = 1.5  # times queries, keys and values: what kept probabilities may take
FILLING = 2**23  # elements of output that it has at least: 256 tiles of 128 x 256, two for each SM


class Heads(NamedTuple):
    """Of what there is to compute: b, H, K and d."""

    sequences: int
    heads: int
    groups: int
    channels: int


class Part(NamedTuple):
    """What is computed at once.

    Attributes:
        piece: of the queries.
        sequences: of the batch.
        groups: of the query groups; all, where there is more than one sequence.
        matrices: both, of all query groups of all sequences, sequence by sequence.
    """

    piece: Piece
    sequences: slice
    groups: slice
    matrices: slice


def divide(
    pieces: Sequence[Piece], heads: Heads, *, scores: int = SCORES, filling: int = FILLING
) -> list[Part]:
    """The parts of all pieces, in the order to compute them.

    Causal pieces grow, so the last one comes first: memory that it leaves has room for the others.

    Args:
        pieces: of the queries, in order.
        heads: what each of them has.
        scores: that a part has at most.
        filling: elements of output that it has at least, which comes first.
    """
    return [
        part
        for piece in reversed(pieces)
        for part in _of_piece(piece, heads, scores=scores, filling=filling)
    ]


def largest(parts: Sequence[Part], heads: Heads) -> int:
    """Scores of the largest part."""
    shared = heads.heads // heads.groups
    return max(
        part.piece.length * part.piece.keys * shared * _count(part.sequences) * _count(part.groups)
        for part in parts
    )


def _of_piece(piece: Piece, heads: Heads, *, scores: int, filling: int) -> Iterator[Part]:
    rows = heads.sequences * heads.heads * piece.length
    wanted = -(-rows * piece.keys // scores)
    most = rows * heads.channels // filling
    # Matrices, of one query group of one sequence each.
    together = -(-heads.sequences * heads.groups // max(1, min(wanted, most)))
    sequences, groups = max(1, together // heads.groups), min(together, heads.groups)
    for sequence in range(0, heads.sequences, sequences):
        for group in range(0, heads.groups, groups):
            last = min(sequence + sequences, heads.sequences)
            behind = min(group + groups, heads.groups)
            matrices = slice(sequence * heads.groups + group, (last - 1) * heads.groups + behind)
            yield Part(piece, slice(sequence, last), slice(group, behind), matrices)


def _count(part: slice) -> int:
    return part.stop - part.start

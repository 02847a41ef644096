"""Rotary frequencies of the tokens that a rank has, from those of the whole sequence."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_helix.exchange.packed import Share
from megatron_helix.exchange.pieces import Piece
from megatron_helix.exchange.plan import Plan


def piece_frequencies(frequencies: torch.Tensor, mine: Sequence[Piece]) -> torch.Tensor:
    """Those of the pieces' positions, in their order: ``[s, ...] -> [s/m, ...]``.

    By slices: an index would be copied to the GPU, for which the host waits in every layer.
    """
    return torch.cat([frequencies[piece.start : piece.end] for piece in mine])


def document_frequencies(
    frequencies: Any, share: Share, plan: Plan, *, fused: bool
) -> tuple[Any, Any]:
    """(query, key) rotary frequencies of a packed row: of each of my queries, and as given.

    Both are of my tokens where they attend gap by gap.

    Megatron counts positions from the beginning of a document, but where there are as many
    frequencies as tokens: from that of the row. The fused kernel, which turns the keys by what is
    returned here, never does.
    """
    query, key = frequencies if isinstance(frequencies, tuple) else (frequencies,) * 2
    of_row = query.size(0) == plan.documents[-1] and not fused
    mine = query[share.positions if of_row else share.in_documents]
    return mine, key if share.gaps is None else mine

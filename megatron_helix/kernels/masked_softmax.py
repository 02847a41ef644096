"""Softmax of the scores of one piece of queries, and its gradient, without a mask in memory.

Only the keys at the edge of what a piece sees are masked, by a comparison of positions: of a causal
piece those of its own queries. Where TransformerEngine is installed, its fused kernel for a causal
mask that is aligned to the last key does it all at once.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from megatron_helix.kernels.query_pieces import ALIGNED, Piece, Sight, hidden_edges

HIDDEN = -10000.0  # what Megatron writes where a given mask hides: no row is without a key
CAUSAL = Sight(left=None, right=0)


class Scores(NamedTuple):
    """What a softmax must know of scores.

    Attributes:
        sight: how far a query sees.
        coefficient: the scores times it are what the softmax is of; in fp32.
    """

    sight: Sight
    coefficient: float


def columns(keys: int, offset: torch.Tensor | None) -> int:
    """Of a row of scores. With a softmax offset it has a column more, and some to keep alignment.

    They belong to keys without a value: the offset is the first one's score, the others have none.
    """
    return keys if offset is None else keys + ALIGNED


def softmax(
    scores: torch.Tensor,
    piece: Piece,
    how: Scores,
    mask: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """Probabilities of one piece's scores, in their dtype; overwrites the scores.

    Args:
        scores: ``[b, H, length, columns]``, contiguous.
        piece: its queries and keys.
        how: what else there is to know.
        mask: ``[b or 1, 1, length, keys]``, true where hidden beside what ``how`` hides.
        offset: ``[H]``, one more term of the denominator.
    """
    if mask is None and offset is None and _is_fused(scores, piece, how.sight):
        return _kernels().scaled_aligned_causal_masked_softmax_forward(scores, how.coefficient)
    wide = scores
    if how.coefficient != 1.0:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * how.coefficient
    if offset is not None:
        wide[..., piece.keys :] = -torch.inf
        wide[..., piece.keys] = offset.to(wide.dtype)[:, None]
    if mask is not None:
        wide[..., : piece.keys].masked_fill_(mask, HIDDEN)
    _hide(wide, piece, how.sight)
    return torch.softmax(wide, dim=-1).to(scores.dtype)


def softmax_backward(
    grad: torch.Tensor, probabilities: torch.Tensor, piece: Piece, how: Scores, *, plain: bool
) -> torch.Tensor:
    """Gradient of ``coefficient * scores``, in the place of ``grad``.

    Args:
        grad: of the probabilities.
        probabilities: of :func:`softmax`.
        piece: their queries and keys.
        how: what else there is to know.
        plain: whether there was neither mask nor offset.
    """
    if plain and _is_fused(probabilities, piece, how.sight):
        return _kernels().scaled_aligned_causal_masked_softmax_backward(grad, probabilities, 1.0)
    # A row's sum is complete before an element of it is written, on CPUs and GPUs.
    return torch.ops.aten._softmax_backward_data.out(
        grad, probabilities, -1, probabilities.dtype, grad_input=grad
    )


def _hide(scores: torch.Tensor, piece: Piece, sight: Sight) -> None:
    queries = torch.arange(piece.position, piece.position + piece.length, device=scores.device)
    for first, last in hidden_edges(piece, sight):
        distance = torch.arange(first, last, device=scores.device) - queries[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if sight.right is not None:
            hidden |= distance > sight.right
        if sight.left is not None:
            hidden |= distance < -sight.left
        scores[..., first - piece.start : last - piece.start].masked_fill_(hidden, -torch.inf)


def _is_fused(scores: torch.Tensor, piece: Piece, sight: Sight) -> bool:
    """Whether TransformerEngine has a kernel for it; it ran on H200 with TransformerEngine 2.20.

    Its conditions (2.x, ``FusedScaleMaskSoftmax.is_kernel_available``): half precision, rows of
    more than 16 and less than 16384 keys, a multiple of 8, and batches and queries by the block.
    """
    return (
        scores.is_cuda
        and scores.dtype in (torch.float16, torch.bfloat16)
        and sight == CAUSAL
        and piece.end == piece.position + piece.length
        and 16 < piece.keys < 16384
        and piece.keys % 8 == 0
        and piece.length % 8 == 0
        and scores.size(0) * scores.size(1) % 4 == 0
        and _kernels() is not None
    )


@cache
def _kernels() -> Any:
    """TransformerEngine's extension; None where it, or this kernel of it, is not installed."""
    try:
        import transformer_engine_torch as extension  # type: ignore[import-not-found]
    except ImportError:
        return None
    return extension if hasattr(extension, "scaled_aligned_causal_masked_softmax_forward") else None

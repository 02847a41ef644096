"""Softmax of the scores of one piece of queries, and its gradient, without a mask in memory.

Only the keys at the edge of what a piece sees are masked, by a comparison of positions: of a causal
piece those of its own queries. On a GPU one kernel does it all
(:mod:`megatron_helix.kernels.softmax_kernels`), unless there is a mask or a softmax offset.
"""

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


def softmax_(
    scores: torch.Tensor,
    piece: Piece,
    how: Scores,
    mask: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> None:
    """Make one piece's scores probabilities, in their own memory.

    Args:
        scores: ``[b, H, length, columns]``, contiguous.
        piece: its queries and keys.
        how: what else there is to know.
        mask: ``[b or 1, 1, length, keys]``, true where hidden beside what ``how`` hides.
        offset: ``[H]``, one more term of the denominator.
    """
    if mask is None and offset is None and _has_kernel(scores):
        _kernels().forward(scores, how.coefficient, *_visible(piece, how.sight))
        return
    wide = scores
    if how.coefficient != 1.0:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * how.coefficient
    if offset is not None:
        wide[..., piece.keys :] = -torch.inf
        wide[..., piece.keys] = offset.to(wide.dtype)[:, None]
    if mask is not None:
        wide[..., : piece.keys].masked_fill_(mask, HIDDEN)
    _hide(wide, piece, how.sight)
    # A row's sum is complete before an element of it is written, on CPUs and GPUs.
    torch.softmax(wide, dim=-1, out=wide)
    if wide is not scores:
        scores.copy_(wide)


def softmax_backward_(
    grad: torch.Tensor, probabilities: torch.Tensor, piece: Piece, how: Scores, *, plain: bool
) -> None:
    """Make the gradient of the probabilities that of ``coefficient * scores``, in its own memory.

    Args:
        grad: of the probabilities.
        probabilities: of :func:`softmax_`.
        piece: their queries and keys.
        how: what else there is to know.
        plain: whether there was neither mask nor offset.
    """
    if plain and _has_kernel(probabilities):
        _kernels().backward(grad, probabilities, *_visible(piece, how.sight))
        return
    torch.ops.aten._softmax_backward_data.out(
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


def _has_kernel(scores: torch.Tensor) -> bool:
    on_gpu = scores.device.type == "cuda"
    return on_gpu and scores.dtype != torch.float64 and scores.size(-1) <= _kernels().LONGEST


def _kernels() -> Any:
    from megatron_helix.kernels import softmax_kernels  # Triton, where there is a GPU

    return softmax_kernels


def _visible(piece: Piece, sight: Sight) -> tuple[int, int, int]:
    """Column of the first query's own key, and how many a query sees before and behind its own."""
    far = piece.position + piece.length + piece.keys
    left, right = (far if side is None else side for side in sight)
    return piece.position - piece.start, left, right

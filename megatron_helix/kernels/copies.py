"""Copies that put tensors in another order in memory, as wide as memory is.

Packing and unpacking an exchange is such a copy, and takes longer than the link where it moves
elements of two bytes one by one. Whole runs of channels keep their order, so that words of 16 bytes
can be moved instead; a transposition, which has no runs, goes through tiles on a GPU. Parts of
unequal length travel in the length of the longest, zeros behind them: the copy that joins them
leaves the zeros away.
"""

from collections.abc import Sequence
from typing import Any

import torch

WORD = torch.complex128  # torch's widest element, 16 bytes; it is only moved


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous()``, copied by words of 16 bytes where its innermost runs have whole ones."""
    if x.is_contiguous():
        return x
    if x.device.type == "cuda" and x.dim() == 2 and x.t().is_contiguous():
        from megatron_helix.kernels import transposition  # Triton, where there is a GPU

        return transposition.transposed(x.t())
    if not _has_whole_words(x):
        return x.contiguous()
    return x.view(WORD).contiguous().view(x.dtype)


def _has_whole_words(x: torch.Tensor) -> bool:
    """Whether ``x`` can be viewed as words, whose places torch wants to be multiples of theirs."""
    size = x.element_size()
    *outer, inner = x.stride()
    places = [*outer, x.size(-1), x.storage_offset()]
    return inner == 1 and x.data_ptr() % 16 == 0 and all(at * size % 16 == 0 for at in places)


class _Packed(torch.autograd.Function):
    """Forward: :func:`contiguous`. Backward: the gradient as it comes. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return contiguous(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def packed(x: torch.Tensor) -> torch.Tensor:
    """:func:`contiguous` with its gradient: what an exchange does with a permuted view."""
    return _Packed.apply(x)


def joined(parts: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
    """Parts, one behind the other: ``[m, ..., longest, ...] -> [..., sum(lengths), ...]``.

    One copy, or none where they lie so already. The dual of :func:`parted`.

    Args:
        parts: each ``[..., longest, ...]``, of which the first ones count.
        lengths: how many, of every part.
        dim: of a part.
    """
    if min(lengths) < max(lengths):
        return _Joined.apply(parts, lengths, dim)
    return packed(parts.movedim(0, dim)).flatten(dim, dim + 1)


def parted(whole: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
    """Undoes :func:`joined`: ``[..., sum(lengths), ...] -> [m, ..., longest, ...]``, zeros behind.

    As few copies as parts where these are unequal, else one, or none where they lie so already.
    """
    if min(lengths) < max(lengths):
        return _Parted.apply(whole, lengths, dim)
    return packed(whole.unflatten(dim, (len(lengths), -1)).movedim(dim, 0))


class _Joined(torch.autograd.Function):
    """Forward: the first of every part, in one copy. Backward: :class:`_Parted`. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
        ctx.how = lengths, dim
        return _join(parts, lengths, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _part(grad, *ctx.how), None, None


class _Parted(torch.autograd.Function):
    """Forward: parts with zeros behind them. Backward: :class:`_Joined`. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
        ctx.how = lengths, dim
        return _part(whole, lengths, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _join(grad, *ctx.how), None, None


def _join(parts: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
    pieces = zip(parts, lengths, strict=True)
    return torch.cat([part.narrow(dim, 0, length) for part, length in pieces], dim)


def _part(whole: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
    longest = max(lengths)
    shape = (*whole.shape[:dim], longest, *whole.shape[dim + 1 :])
    parts = whole.new_empty(len(lengths), *shape)
    for part, piece in zip(parts, whole.split(list(lengths), dim), strict=True):
        length = piece.size(dim)
        part.narrow(dim, 0, length).copy_(piece)
        part.narrow(dim, length, longest - length).zero_()
    return parts


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of what was made on the host, for which the host does not wait."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

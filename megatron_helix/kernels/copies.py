"""Copies that put tensors in another order in memory, as wide as memory is.

Packing and unpacking an exchange is such a copy, and takes longer than the link where it moves
elements of two bytes one by one. Whole runs of channels keep their order, so that words of 16 bytes
can be moved instead; a transposition, which has no runs, goes through tiles on a GPU.
"""

from typing import Any

import torch

WORD = torch.complex128  # torch's widest element, 16 bytes; it is only moved


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous()``, copied by words of 16 bytes where its innermost runs have whole ones."""
    if x.is_contiguous():
        return x
    if x.dim() == 2 and x.t().is_contiguous() and x.device.type == "cuda":
        return _transposed(x.t())
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


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """``[rows, columns] -> [columns, rows]``, contiguous both."""
    from megatron_helix.kernels import transposition  # Triton, where there is a GPU

    return transposition.transposed(x)

"""Softmax of scores in their own memory, and its gradient in that of its input, in Triton.

A program has a row in registers: what is seen of it is read once and all of it written once, with
zeros where nothing is seen. TransformerEngine's kernel has 32 threads a row, which from some 4096
keys on are too few for their registers, and writes to memory of its own; torch's gradient makes a
product of the size of the scores first.

Triton's interpreter runs the kernels in a test on the CPU. On an H200 they move 1.4 to 3.2 TB/s, as
near to fp32 as torch's; TransformerEngine's take half of the time at 512 keys, twice to ten times
as long from 4096 keys on.
"""

import torch
import triton
import triton.language as tl

LONGEST = 32768  # columns of a row that registers hold: 32 for each of 1024 threads


@triton.jit(do_not_specialize=["length", "own", "left", "right"])
def _forward(scores, coefficient, columns, length, own, left, right, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    query = own + (row % length).to(tl.int32)
    seen = (column >= query - left) & (column <= query + right) & (column < columns)
    place = scores + row * columns + column
    x = tl.load(place, mask=seen, other=0.0).to(tl.float32) * coefficient
    x = tl.where(seen, x, float("-inf"))
    x = tl.exp(x - tl.max(x, 0))
    tl.store(place, x / tl.sum(x, 0), mask=column < columns)


@triton.jit(do_not_specialize=["length", "own", "left", "right"])
def _backward(grad, probabilities, columns, length, own, left, right, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    query = own + (row % length).to(tl.int32)
    seen = (column >= query - left) & (column <= query + right) & (column < columns)
    place = row * columns + column
    p = tl.load(probabilities + place, mask=seen, other=0.0).to(tl.float32)
    weighted = p * tl.load(grad + place, mask=seen, other=0.0).to(tl.float32)
    tl.store(grad + place, weighted - p * tl.sum(weighted, 0), mask=column < columns)


def forward(scores: torch.Tensor, coefficient: float, own: int, left: int, right: int) -> None:
    """``scores = softmax(coefficient * scores)`` over the columns that a row sees, 0 in the others.

    Args:
        scores: ``[..., length, columns]``, contiguous; 32768 columns at most.
        coefficient: in fp32.
        own: column of the first row's own key; that of the next row is the next one.
        left: how many columns before its own a row sees.
        right: how many behind it.
    """
    length, columns = scores.shape[-2:]
    grid, block = (scores.numel() // columns,), triton.next_power_of_2(columns)
    _forward[grid](  # pyright: ignore[reportIndexIssue]
        *(scores, coefficient, columns, length, own, left, right),
        BLOCK=block,
        num_warps=_warps(block),
    )


def backward(
    grad: torch.Tensor, probabilities: torch.Tensor, own: int, left: int, right: int
) -> None:
    """``grad = p (grad - sum(p grad))``, where ``p`` is what :func:`forward` made.

    Args:
        grad: like ``probabilities``; what is not seen is not read.
        probabilities: ``[..., length, columns]``, contiguous.
        own: as for :func:`forward`.
        left: likewise.
        right: likewise.
    """
    length, columns = probabilities.shape[-2:]
    grid, block = (probabilities.numel() // columns,), triton.next_power_of_2(columns)
    _backward[grid](  # pyright: ignore[reportIndexIssue]
        *(grad, probabilities, columns, length, own, left, right),
        BLOCK=block,
        num_warps=_warps(block),
    )


def _warps(block: int) -> int:
    """16 elements a thread, 32 in the longest rows."""
    return min(32, max(4, block // 512))

"""Parts added to an accumulator by tiles, in Triton: reads every element once, writes the sums.

An accumulator that is the transposed view of what lies in memory is turned on the way, so that both
sides move whole lines. Triton's interpreter runs the kernel in a test on the CPU.
"""

import torch
import triton
import triton.language as tl

TILE = 64


@triton.jit
def _add(y, x, rows, columns, size, PARTS: tl.constexpr, TURNED: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    part = x + place
    total = tl.load(part, mask=inside).to(tl.float32)
    for _ in tl.static_range(1, PARTS):
        part += size
        total += tl.load(part, mask=inside)
    if TURNED:
        place = column[:, None] * rows + row[None, :]
        inside, total = tl.trans(inside), tl.trans(total)
    tl.store(y + place, total + tl.load(y + place, mask=inside), mask=inside)


def add(accumulator: torch.Tensor, parts: torch.Tensor) -> None:
    """``accumulator += parts[0] + parts[1] + ...``, in fp32.

    Args:
        accumulator: contiguous, or the transposed view of a contiguous matrix.
        parts: ``[m, *accumulator.shape]``, contiguous.
    """
    columns = accumulator.size(-1)
    rows = accumulator.numel() // columns
    turned = not accumulator.is_contiguous()
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    _add[grid](  # pyright: ignore[reportIndexIssue]
        accumulator,
        parts,
        rows,
        columns,
        rows * columns,
        PARTS=parts.size(0),
        TURNED=turned,
        TILE=TILE,
    )

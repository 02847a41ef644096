"""Two parts of an attention merged by their log-sum-exp, in Triton (:mod:`.merges` says how).

Triton's interpreter runs the kernel in a test on the CPU.
"""

import torch
import triton
import triton.language as tl

ELEMENTS = 8192  # of a program


@triton.jit
def _merge(
    output,
    lse,
    part,
    part_lse,
    seen,
    rows,
    channels,
    each,
    SOME: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, CHANNELS)
    inside = row < rows
    if SOME:  # a token's rows are its heads
        inside &= tl.load(seen + row // each, mask=inside, other=0) != 0
    place = row[:, None] * channels + column[None, :]
    both = inside[:, None] & (column < channels)[None, :]
    first = tl.load(lse + row, mask=inside, other=0.0)
    second = tl.load(part_lse + row, mask=inside, other=0.0)
    most = tl.maximum(first, second)
    total = most + tl.log(tl.exp(first - most) + tl.exp(second - most))
    one = tl.load(output + place, mask=both, other=0.0).to(tl.float32)
    two = tl.load(part + place, mask=both, other=0.0).to(tl.float32)
    merged = tl.exp(first - total)[:, None] * one + tl.exp(second - total)[:, None] * two
    tl.store(output + place, merged, mask=both)
    tl.store(lse + row, total, mask=inside)


def merge(
    output: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    seen: torch.Tensor | None,
) -> None:
    """As :func:`megatron_helix.kernels.merges.merge`, with ``lse`` in fp32."""
    given = (output, lse, part, part_lse)
    assert all(x.is_contiguous() for x in given), [x.stride() for x in given]
    rows, channels = lse.numel(), output.size(-1)
    width = triton.next_power_of_2(channels)
    height = max(1, ELEMENTS // width)
    _merge[(triton.cdiv(rows, height),)](  # pyright: ignore[reportIndexIssue]
        *given,
        given[0] if seen is None else seen.view(torch.uint8),
        rows,
        channels,
        rows // max(1, len(output)),
        SOME=seen is not None,
        ROWS=height,
        CHANNELS=width,
    )

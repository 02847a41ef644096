"""Sums of half-precision parts, added up in fp32 and rounded once.

A collective that sums rounds at every hop. Where a sum must keep what its parts have, the parts are
sent as they are and added up here: by one kernel on a GPU, which moves no more memory than the sum
and a second addition would.
"""

import torch


def add(accumulator: torch.Tensor, parts: torch.Tensor) -> None:
    """``accumulator += parts[0] + parts[1] + ...``, in fp32, or wider if one of them is.

    Args:
        accumulator: of any dtype, rounded to once; may be the transposed view of a matrix.
        parts: ``[m, *accumulator.shape]``, contiguous; overwritten where they are as wide as the
            sum.
    """
    wide = torch.promote_types(torch.promote_types(accumulator.dtype, parts.dtype), torch.float32)
    turned = accumulator.dim() == 2 and not accumulator.is_contiguous()
    whole = (accumulator.t() if turned else accumulator).is_contiguous()
    if parts.device.type == "cuda" and wide == torch.float32 and whole:
        from megatron_helix.kernels import summation  # Triton, where there is a GPU

        summation.add(accumulator, parts)
        return
    total = parts[0].to(wide)
    for part in parts[1:]:
        total += part
    # A sum that lies turned: torch turns faster than it adds across.
    accumulator += total.t().contiguous().t() if turned else total


def total(parts: torch.Tensor) -> torch.Tensor:
    """``parts[0] + parts[1] + ...``, rounded once to their own dtype; arguments as for `add`."""
    summed = torch.zeros_like(parts[0])
    add(summed, parts)
    return summed

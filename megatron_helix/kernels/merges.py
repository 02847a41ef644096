"""Parts of an attention, each of other keys, merged by their log-sum-exp.

With L the log-sum-exp of a query's scores in each part::

    L = log(exp L_1 + exp L_2)     O = exp(L_1 - L) O_1 + exp(L_2 - L) O_2

One kernel on a GPU, which reads both outputs once and writes one.
"""

import torch


def merge(
    output: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> None:
    """Add to ``output`` and ``lse``, in place, what other keys give the same queries.

    Args:
        output: ``[t, ..., d]``, contiguous; sums are made in fp32, or wider if it is.
        lse: ``[t, ...]``, contiguous, finite, in fp32 or wider.
        part: like ``output``, of its dtype or a narrower one.
        part_lse: like ``lse``.
        seen: ``[t]``, the queries that see any of the keys; of the others ``part`` and ``part_lse``
            are not looked at. All by default.
    """
    if output.device.type == "cuda" and lse.dtype == torch.float32:
        from megatron_helix.kernels import merging  # Triton, where there is a GPU

        merging.merge(output, lse, part, part_lse, seen)
        return
    rows = slice(None) if seen is None else seen.nonzero().squeeze(1)
    both = torch.logaddexp(lse[rows], part_lse[rows])
    first, second = (torch.exp(x[rows] - both)[..., None] for x in (lse, part_lse))
    output[rows] = (first * output[rows] + second * part[rows]).to(output.dtype)
    lse[rows] = both

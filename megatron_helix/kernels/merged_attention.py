"""Causal attention of runs of queries: the past of each without a mask, and its own square, merged.

Fused kernels leave out what is above the diagonal of a square. Of a run of l queries behind P keys
they compute the whole rectangle ``[l, P + l]``; here it is ``[l, P]`` and half of ``[l, l]``. With
the log-sum-exps L of both parts::

    L = log(exp L_past + exp L_own)     O = exp(L_past - L) O_past + exp(L_own - L) O_own

Backward, a kernel that is given O and L of the whole makes its own keys' share of the gradients, as
in ring attention (Liu, Zaharia, Abbeel 2023, arXiv 2310.01889); gradients of keys and values are
added up in place, in fp32, and rounded once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_helix.kernels import fused_kernels
from megatron_helix.kernels.fused_kernels import Attended, Kernel

Run = tuple[int, int]


def joined(runs: Sequence[Run]) -> list[Run]:
    """Runs of (position, length) in order, those that follow one another as one."""
    found: list[Run] = []
    for position, length in runs:
        if found and sum(found[-1]) == position:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((position, length))
    return found


def causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[Run],
    *,
    scale: float,
) -> torch.Tensor:
    """Queries ``[sq, b, H, d]``, keys and values ``[sk, b, K, d]`` -> ``[sq, b, H, d]``.

    Args:
        query: the runs, one behind the other.
        key: of all positions.
        value: like ``key``.
        runs: (position, length) of neighbouring queries, in order.
        scale: of the product of queries and keys.
    """
    return _Attention.apply(query, key, value, joined(runs), scale, True)


def full(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """The same where every query sees every key."""
    return _Attention.apply(query, key, value, [(0, query.size(0))], scale, False)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[s, b, H, d] -> [b, H, s, d]``, a view."""
    return x.permute(1, 2, 0, 3)


def _parts(run: Run, keys: int, masked: bool) -> Iterator[tuple[slice, bool]]:
    """Keys of a run that one kernel attends to, and whether causally."""
    position, length = run
    if not masked:
        yield slice(0, keys), False
        return
    if position:
        yield slice(0, position), False
    yield slice(position, position + length), True


class _Attention(torch.autograd.Function):
    """Forward: as :func:`causal` and :func:`full` say. Saves what goes in and comes out, and L.

    Backward: gradients of query, key and value, by a kernel's backward pass for each forward one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        runs: list[Run],
        scale: float,
        masked: bool,
    ) -> torch.Tensor:
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums, ctx.calls, first = [], [], 0
        for run in runs:
            rows = slice(first, first + run[1])
            first = rows.stop
            made = []
            for keys, causally in _parts(run, key.size(0), masked):
                kernel = fused_kernels.kernel(query, causal=causally, scale=scale)
                attended = kernel.forward(*map(_by_head, (query[rows], key[keys], value[keys])))
                made.append(attended)
                ctx.calls.append((kernel, rows, keys, len(sums), attended.state))
            output, lse = _merged(made)
            _by_head(context[rows]).copy_(output)
            sums.append(lse)
        ctx.save_for_backward(query, key, value, context, *sums)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, context, *sums = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        made = [torch.zeros_like(x, dtype=wide) for x in (query, key, value)]
        kernel: Kernel
        for kernel, rows, keys, run, state in ctx.calls:
            places = (rows, keys, keys)
            qkv = tuple(
                _by_head(x[place]) for x, place in zip((query, key, value), places, strict=True)
            )
            attended = Attended(_by_head(context[rows]), sums[run], state)
            found = kernel.backward(_by_head(grad[rows]), qkv, attended)
            for total, place, part in zip(made, places, found, strict=True):
                _by_head(total[place]).add_(part)
        return *(total.to(query.dtype) for total in made), None, None, None


def _merged(made: list[Attended]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one or two parts."""
    if len(made) == 1:
        return made[0].output, made[0].lse
    past, own = made
    lse = torch.logaddexp(past.lse, own.lse)
    # The own square has a key that its query sees, so that no weight is undefined.
    share = torch.exp(past.lse - lse)[..., None]
    output = torch.lerp(own.output.to(share.dtype), past.output.to(share.dtype), share)
    return output, lse

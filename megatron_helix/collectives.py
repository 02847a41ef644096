"""Collectives with their gradients. The group is an argument; each docstring names its dual.

Every tensor that goes into a collective is made contiguous first: ``torch.empty_like`` of a permuted
tensor keeps its strides, and a collective into such a buffer scrambles silently.
"""

from typing import Any

import torch
import torch.distributed as dist


class _AllToAll(torch.autograd.Function):
    """Forward: ``y[k]`` on rank j is ``x[j]`` of rank k. Backward: itself. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grad, ctx.group), None


def all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange equal chunks over ``group``; its own dual.

    Args:
        x: ``[p, ...]`` with p the group's size; chunk k goes to rank k.
        group: the ranks that exchange.

    Returns:
        ``[p, ...]``: chunk k came from rank k. Contiguous.
    """
    return _AllToAll.apply(x, group)


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    assert x.size(0) == group.size(), (x.shape, group.size())
    x = x.contiguous()
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x, group=group)
    return y

"""Collectives with their gradients. The group is an argument; each docstring names its dual.

Every tensor that goes into a collective is made contiguous first: ``torch.empty_like`` of a
permuted tensor keeps its strides, and a collective into such a buffer scrambles silently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from megatron_helix.kernels import sums
from megatron_helix.kernels.copies import contiguous

# The names since torch 2.13, where the older ones look through all filters of warnings each time.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllToAll(torch.autograd.Function):
    """Forward: ``y[k]`` on rank j is ``x[j]`` of rank k. Backward: itself. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return start_exchange(x, group, early=False).wait()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_exchange(grad, ctx.group, early=False).wait(), None


def all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange equal chunks over ``group``; its own dual.

    Args:
        x: ``[p, ...]`` with p the group's size; chunk k goes to rank k.
        group: the ranks that exchange.

    Returns:
        ``[p, ...]``: chunk k came from rank k. Contiguous.
    """
    return _AllToAll.apply(x, group)


class _AllGather(torch.autograd.Function):
    """Forward: the ranks' tensors one after the other. Backward: reduce-scatter. Saves nothing.

    The backward sends each part of the sum to where it is added up: rounded once, not at every hop.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = grad.view(ctx.group.size(), -1, *grad.shape[1:])
        return sums.total(start_exchange(parts, ctx.group, early=False).wait()), None


class _ReduceScatter(torch.autograd.Function):
    """Forward: the sum over ranks, one chunk each. Backward: all-gather. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    """Forward: the sum over ranks, on all of them. Backward: itself. Saves nothing.

    The backward sums because every rank uses the sum for its own part of what follows.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.group), None


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[a, ...] -> [p * a, ...]`` in rank order; dual of :func:`reduce_scatter`."""
    return _AllGather.apply(x, group)


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[p * a, ...] -> [a, ...]``: rank k keeps chunk k of the sum; dual of :func:`all_gather`."""
    return _ReduceScatter.apply(x, group)


class _UnevenAllToAll(torch.autograd.Function):
    """Forward: rows to each rank, rows from each. Backward: the same rows back. Saves nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.back = received, sent, group
        return _exchange_rows(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange_rows(grad, *ctx.back), None, None, None


def uneven_all_to_all(
    x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Exchange parts of unequal length; with ``sent`` and ``received`` exchanged its own dual.

    Args:
        x: ``[sum(sent), ...]``: for rank 0, then for rank 1, ...
        sent: rows for each rank.
        received: rows from each rank.
        group: the ranks that exchange.

    Returns:
        ``[sum(received), ...]``, from rank 0, then from rank 1, ...
    """
    return _UnevenAllToAll.apply(x, sent, received, group)


def _exchange_rows(
    x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    x = contiguous(x)
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x, received, sent, group=group)
    return y


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of ``x`` over ``group`` on every rank; its own dual."""
    return _AllReduce.apply(x, group)


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """:func:`all_gather` without a gradient, for use inside a backward pass."""
    return start_gather(x, group, early=False).wait()


def scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """:func:`reduce_scatter` without a gradient, for use inside a backward pass."""
    return start_scatter_sum(x, group, early=False).wait()


@dataclass
class UnderWay:
    """A collective that has begun; its result must not be touched before :meth:`wait`."""

    result: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        """The result. On a GPU the stream waits, not the process."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_gather(
    x: torch.Tensor, group: dist.ProcessGroup, *, early: bool, into: torch.Tensor | None = None
) -> UnderWay:
    """:func:`gather`, begun.

    Args:
        x: ``[a, ...]``.
        group: p ranks.
        early: whether to come back before it is through. NCCL then works on a stream of its own,
            beside the compute that follows.
        into: where the result is to lie, contiguous; new memory by default.

    Returns:
        ``[p * a, ...]`` once waited for; of a rank alone, ``x`` itself.
    """
    x = contiguous(x)
    if group.size() == 1:
        return UnderWay(x if into is None else into.copy_(x), None)
    y = x.new_empty(group.size() * x.size(0), *x.shape[1:]) if into is None else into
    return UnderWay(y, _gather(y, x, group=group, async_op=early))


def start_gathers(
    xs: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
    *,
    early: bool,
    into: Sequence[torch.Tensor],
) -> Sequence[UnderWay]:
    """:func:`start_gather` of each; begun early on a GPU, all of them are one kernel.

    NCCL's kernels of a group wait for each other, and under ``CUDA_DEVICE_MAX_CONNECTIONS=1`` what
    is launched behind the last one waits until that has started: of two kernels in front of a GEMM
    the first would be exposed.
    """
    if not _is_one_kernel(xs, group, early):
        places = zip(xs, into, strict=True)
        return [start_gather(x, group, early=early, into=place) for x, place in places]
    with _coalescing_manager(group=group, async_ops=True) as work:
        for x, place in zip(xs, into, strict=True):
            _gather(place, contiguous(x), group=group)
    return [UnderWay(place, work) for place in into]


def start_scatter_sum(x: torch.Tensor, group: dist.ProcessGroup, *, early: bool) -> UnderWay:
    """:func:`scatter_sum`, begun; ``[p * a, ...] -> [a, ...]``. ``early`` as in `start_gather`."""
    assert x.size(0) % group.size() == 0, (x.shape, group.size())
    x = contiguous(x)
    if group.size() == 1:
        return UnderWay(x, None)
    y = torch.empty((x.size(0) // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return UnderWay(y, _scatter_sum(y, x, group=group, async_op=early))


def start_exchange(x: torch.Tensor, group: dist.ProcessGroup, *, early: bool) -> UnderWay:
    """:func:`all_to_all` without a gradient, begun; ``early`` as in `start_gather`."""
    assert x.size(0) == group.size(), (x.shape, group.size())
    x = contiguous(x)
    if group.size() == 1:
        return UnderWay(x, None)
    y = torch.empty_like(x)
    return UnderWay(y, dist.all_to_all_single(y, x, group=group, async_op=early))


def start_exchanges(
    xs: Sequence[torch.Tensor], group: dist.ProcessGroup, *, early: bool
) -> Sequence[UnderWay]:
    """:func:`start_exchange` of each, as :func:`start_gathers`."""
    if not _is_one_kernel(xs, group, early):
        return [start_exchange(x, group, early=early) for x in xs]
    xs = [contiguous(x) for x in xs]
    results = [torch.empty_like(x) for x in xs]
    with _coalescing_manager(group=group, device=xs[0].device, async_ops=True) as work:
        for x, result in zip(xs, results, strict=True):
            dist.all_to_all_single(result, x, group=group, async_op=True)
    return [UnderWay(result, work) for result in results]


def start_sends(x: torch.Tensor, group: dist.ProcessGroup, *, early: bool) -> UnderWay:
    """An exchange of what is for the others alone; on a GPU one kernel.

    Args:
        x: ``[p - 1, ...]``, contiguous: a chunk for each other rank, in rank order.
        group: p ranks.
        early: as in `start_gather`.

    Returns:
        ``[p - 1, ...]`` once waited for: a chunk from each other rank, in rank order.
    """
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    assert len(x) == len(others), (x.shape, group.size())
    y = torch.empty_like(x)
    moves = [
        dist.P2POp(move, chunk, group=group, group_peer=rank)
        for move, chunks in ((dist.isend, x), (dist.irecv, y))
        for rank, chunk in zip(others, chunks, strict=True)
    ]
    begun = UnderWay(y, Works(dist.batch_isend_irecv(moves)) if moves else None)
    return begun if early else UnderWay(begun.wait(), None)


@dataclass
class Works:
    """Some works as one."""

    works: Sequence[Any]

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self.works:
            work.wait()


def _is_one_kernel(xs: Sequence[torch.Tensor], group: dist.ProcessGroup, early: bool) -> bool:
    return early and len(xs) > 1 and group.size() > 1 and xs[0].device.type == "cuda"


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y

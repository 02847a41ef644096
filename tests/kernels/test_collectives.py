"""The collectives and their gradients against the definition, on all ranks' tensors.

Permuted tensors are the point: a collective into a buffer made by ``torch.empty_like`` of one keeps
its strides and scrambles silently, first of all in the backward pass.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_helix.kernels.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from tests.distributed import run_distributed

CHUNK = (2, 3, 5)

Ranks = list[torch.Tensor]


def chunks(tensors: Ranks, rank: int) -> Ranks:
    """Chunk ``rank`` of every rank's tensor."""
    return [tensor.chunk(len(tensors))[rank] for tensor in tensors]


def total(tensors: Ranks) -> torch.Tensor:
    """Sum over ranks; exact, because the numbers are small integers."""
    return torch.stack(tensors).sum(0)


# What rank r must have given every rank's input, and backward given every rank's gradient.
DEFINITIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "all_to_all": (
        all_to_all,
        lambda x, r: torch.cat(chunks(x, r)),
        lambda g, r: torch.cat(chunks(g, r)),
    ),
    "all_gather": (all_gather, lambda x, r: torch.cat(x), lambda g, r: total(chunks(g, r))),
    "reduce_scatter": (reduce_scatter, lambda x, r: total(chunks(x, r)), lambda g, r: torch.cat(g)),
    "all_reduce": (all_reduce, lambda x, r: total(x), lambda g, r: total(g)),
}


def numbered(shape: torch.Size, rank: int, sign: int) -> torch.Tensor:
    """Every element, over all ranks, is another integer: nothing can hide."""
    count = shape.numel()
    return sign * (torch.arange(count, dtype=torch.float32) + count * rank).view(shape)


def permuted_copy(x: torch.Tensor) -> torch.Tensor:
    """The same values as ``x``, laid out in memory with the axes reversed."""
    axes = tuple(reversed(range(x.dim())))
    copy = x.permute(axes).contiguous().permute(axes)
    assert not copy.is_contiguous()
    return copy


def input_shape(name: str, world_size: int) -> torch.Size:
    """One chunk for each rank, where the collective cuts its input."""
    if name == "all_to_all":
        return torch.Size([world_size, *CHUNK])
    return torch.Size([CHUNK[0] * world_size, *CHUNK[1:]])


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_values_and_gradients_go_where_the_definition_says(name: str, world_size: int) -> None:
    collective, forward, backward = DEFINITIONS[name]
    shape = input_shape(name, world_size)
    inputs = [numbered(shape, rank, 1) for rank in range(world_size)]
    outputs = [forward(inputs, rank) for rank in range(world_size)]
    gradients = [numbered(y.shape, rank, -1) for rank, y in enumerate(outputs)]

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        rank = dist.get_rank()
        results = []
        for of_input in (torch.clone, permuted_copy):
            for of_gradient in (torch.clone, permuted_copy):
                x = of_input(inputs[rank]).requires_grad_()
                y = collective(x, dist.group.WORLD)
                y.backward(of_gradient(gradients[rank]))
                results.append((y.detach(), x.grad))
        return results

    for rank, results in enumerate(run_distributed(run, world_size)):
        for y, x_grad in results:
            assert torch.equal(y, outputs[rank])
            assert torch.equal(x_grad, backward(gradients, rank))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_group_is_the_argument_not_the_world(name: str) -> None:
    collective, forward, _ = DEFINITIONS[name]
    shape = input_shape(name, 2)
    inputs = [numbered(shape, rank, 1) for rank in range(4)]

    def in_pairs() -> torch.Tensor:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        rank = dist.get_rank()
        return collective(inputs[rank], groups[rank % 2])

    for rank, y in enumerate(run_distributed(in_pairs, 4)):
        assert torch.equal(y, forward(inputs[rank % 2 :: 2], rank // 2))


@pytest.mark.parametrize("collective", [all_to_all, reduce_scatter])
def test_a_tensor_without_equal_chunks_for_the_ranks_is_rejected(collective: Callable) -> None:
    def wrong() -> str:
        try:
            collective(torch.zeros(3, 2), dist.group.WORLD)
        except AssertionError as error:
            return str(error)
        return ""

    assert all("torch.Size([3, 2])" in message for message in run_distributed(wrong, 2))

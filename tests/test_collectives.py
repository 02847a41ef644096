"""``all_to_all`` and its gradient against the definition, on gathered tensors.

Permuted tensors are the point: a collective into a buffer made by ``torch.empty_like`` of one keeps
its strides and scrambles silently, first of all in the backward pass.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_helix.collectives import all_to_all
from tests.distributed import run_distributed

CHUNK = (3, 5)


def numbered(rank: int, world_size: int, offset: int) -> torch.Tensor:
    """``[p, 3, 5]`` whose every element, over all ranks, is another integer: nothing can hide."""
    size = (world_size, *CHUNK)
    count = torch.Size(size).numel()
    return (torch.arange(count, dtype=torch.float32) + count * rank + offset).view(size)


def permuted_copy(x: torch.Tensor) -> torch.Tensor:
    """The same values as ``x``, laid out in memory with the axes reversed."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def exchange(permute_input: bool, permute_gradient: bool) -> tuple[torch.Tensor, ...]:
    """What a rank got forward and backward, and the output's contiguity."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, gradient = numbered(rank, size, 0), numbered(rank, size, 10_000)
    if permute_input:
        x = permuted_copy(x)
        assert not x.is_contiguous()
    if permute_gradient:
        gradient = permuted_copy(gradient)
        assert not gradient.is_contiguous()
    x.requires_grad_()
    y = all_to_all(x, dist.group.WORLD)
    y.backward(gradient)
    return y.detach(), x.grad, torch.tensor(y.is_contiguous())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_chunks_and_gradients_go_where_the_definition_says(world_size: int) -> None:
    def cases() -> list[tuple[torch.Tensor, ...]]:
        return [exchange(p, g) for p in (False, True) for g in (False, True)]

    results = run_distributed(cases, world_size)
    inputs = torch.stack([numbered(r, world_size, 0) for r in range(world_size)])
    gradients = torch.stack([numbered(r, world_size, 10_000) for r in range(world_size)])
    for rank, of_rank in enumerate(results):
        for y, x_grad, contiguous in of_rank:
            # Copies, not arithmetic: equality is exact. The exchange is its own dual.
            assert torch.equal(y, inputs[:, rank])
            assert torch.equal(x_grad, gradients[:, rank])
            assert contiguous


def test_the_group_is_the_argument_not_the_world() -> None:
    def in_pairs() -> torch.Tensor:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        x = torch.full((2, 1), float(dist.get_rank()))
        return all_to_all(x, groups[dist.get_rank() % 2])

    results = run_distributed(in_pairs, 4)
    for rank, y in enumerate(results):
        partner = (rank + 2) % 4
        assert sorted(y.flatten().tolist()) == sorted([rank, partner])


def test_a_tensor_without_one_chunk_per_rank_is_rejected() -> None:
    def wrong() -> str:
        try:
            all_to_all(torch.zeros(3, 2), dist.group.WORLD)
        except AssertionError as error:
            return str(error)
        return ""

    assert all("torch.Size([3, 2])" in message for message in run_distributed(wrong, 2))

"""What gloo is lent: collectives of unequal sizes, as NCCL has them, and what the ledger counts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed

P = 3
SIZES = {"equal": [2, 2, 2], "unequal": [3, 1, 2], "some without": [0, 4, 0]}
DTYPES = [torch.float32, torch.bfloat16, torch.int64]
WIDTH = 5


def part(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank puts in: no two numbers of all ranks are equal."""
    return (100 * rank + torch.arange(rows * WIDTH).view(rows, WIDTH)).to(dtype)


def gather_all(async_op: bool) -> list[tuple[torch.Tensor, int]]:
    """What each case gathers, into parts of one tensor as Megatron does, and the bytes counted."""
    group, found = dist.new_group(group_desc="axis"), []
    for sizes in SIZES.values():
        for dtype in DTYPES:
            ledger = CommLedger()
            uninstall = install(ledger)
            whole = torch.full((sum(sizes), WIDTH), -1, dtype=dtype)
            mine = part(group.rank(), sizes[group.rank()], dtype)
            # A transposed copy, transposed back: its memory is not in the order of its elements.
            mine = mine.t().contiguous().t() if async_op else mine
            work: Any = dist.all_gather(
                list(whole.split(sizes)), mine.contiguous(), group=group, async_op=async_op
            )
            if async_op:
                work.wait()
            uninstall()
            found.append((whole, ledger.take()["axis", "all_gather"].sent_bytes))
    return found


@pytest.mark.parametrize("async_op", [False, True])
def test_tensors_of_unequal_size_are_gathered(async_op: bool) -> None:
    cases = [(sizes, dtype) for sizes in SIZES.values() for dtype in DTYPES]
    for rank, found in enumerate(run_distributed(gather_all, P, async_op)):
        for (sizes, dtype), (whole, sent_bytes) in zip(cases, found, strict=True):
            assert torch.equal(whole, torch.cat([part(r, sizes[r], dtype) for r in range(P)]))
            assert sent_bytes == (P - 1) * sizes[rank] * WIDTH * dtype.itemsize


def sum_all() -> list[torch.Tensor]:
    """What each case sums and scatters, as the backward pass of a gather does."""
    rank, found = dist.get_rank(), []
    for sizes in SIZES.values():
        output = torch.full((sizes[rank], WIDTH), -1.0)
        whole = part(rank, sum(sizes), torch.float32)
        dist.reduce_scatter(output, list(whole.split(sizes)))
        found.append(output)
    return found


def test_parts_of_unequal_size_are_summed() -> None:
    for rank, found in enumerate(run_distributed(sum_all, P)):
        for sizes, output in zip(SIZES.values(), found, strict=True):
            whole = sum(part(r, sum(sizes), torch.float32) for r in range(P))
            assert isinstance(whole, torch.Tensor)
            assert torch.equal(output, whole.split(sizes)[rank])

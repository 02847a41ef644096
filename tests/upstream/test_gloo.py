"""What gloo is lent: collectives of unequal sizes, as NCCL has them, and what the ledger counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.covering import fast
from tests.distributed import run_distributed, tiny_gpt
from tests.test_parity import EXCHANGES, GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, NO_BIAS, SP
from tests.training_case import Trained, train

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
            mine = part(dist.get_rank(), sizes[dist.get_rank()], dtype)
            parts = list(whole.split(sizes))
            work: Any = dist.all_gather(parts, mine, group=group, async_op=async_op)
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


def watchers() -> list[int]:
    """Threads that look at sockets, before and after there are more groups, which work."""
    counted = []
    for groups in (1, 5):
        one = torch.ones(1)
        for _ in range(groups):
            dist.all_reduce(one, group=dist.new_group())
        assert one == P**groups
        names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        counted.append(sum("gloo_tcp_loop" in name for name in names))
    return counted


def test_the_groups_of_a_process_share_the_thread_that_looks_at_sockets() -> None:
    for before, after in run_distributed(watchers, P):
        assert after == before


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


# Every token goes to the one expert that its router prefers: experts get unequal shares.
MODEL = (
    *(*NO_BIAS, "--num-experts", "4", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-load-balancing-type", "none", "--moe-router-topk", "1"),
    "--moe-router-pre-softmax",
)
STOCK, HELIX = ("--tensor-model-parallel-size", "4"), ("--helix-m", "2", "--helix-n", "2")
# How stock and helix share tensor-parallel ranks, and the numbers of expert- and of
# expert-tensor-parallel ranks.
SHARED = {
    "stock": (STOCK, 2, 2),
    "activations": ((*HELIX, *EXCHANGES["activations-batch"]), 2, 2),
    "weights": ((*HELIX, *EXCHANGES["weights-batch"]), 2, 2),
    "scores": ((*HELIX, *EXCHANGES["scores"]), 1, 4),
}


def experts(cut: tuple[str, ...], parallel: int, tensor_parallel: int) -> tuple[str, ...]:
    """Flags of a layout."""
    return (
        *(*MODEL, *SP, *cut, "--expert-model-parallel-size", str(parallel)),
        *("--expert-tensor-parallel-size", str(tensor_parallel)),
    )


@pytest.fixture(scope="module")
def weights(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that load them, the same for every way of sharing: drawn, they would depend on it."""
    folder = str(tmp_path_factory.mktemp("experts"))
    save = ("--save", folder, "--save-interval", "1", "--no-save-optim", "--no-save-rng")
    flags = tiny_gpt(corpus_prefix, *experts(STOCK, 4, 1), *save, train_iters=1)
    train({"first": flags}, 4)
    return ("--load", folder, "--finetune", "--no-load-optim", "--no-load-rng")


@pytest.fixture(scope="module")
def whole_experts(corpus_prefix: Path, weights: tuple[str, ...]) -> Trained:
    """A training of experts that are not cut."""
    return _trained(corpus_prefix, experts(STOCK, 4, 1), weights)


def _trained(corpus_prefix: Path, layout: tuple[str, ...], weights: tuple[str, ...]) -> Trained:
    """What the last rank has."""
    flags = tiny_gpt(corpus_prefix, *layout, *weights, train_iters=3)
    return train({"": flags}, 4)[""][-1]


@pytest.mark.parametrize("name", fast(["stock", "weights"], SHARED))
def test_experts_that_are_cut_train_as_whole_ones(
    corpus_prefix: Path, weights: tuple[str, ...], whole_experts: Trained, name: str
) -> None:
    """To rounding, until a token turns to another expert, which moves the loss by more."""
    expected = whole_experts
    actual = _trained(corpus_prefix, experts(*SHARED[name]), weights)
    assert actual.losses[0] == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=GRAD_NORM_TOLERANCE)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-3)
    assert min(actual.losses[1:]) < actual.losses[0]

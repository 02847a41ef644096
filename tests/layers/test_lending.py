"""Trainings in which ranks lend each other their shards: the same numbers, without a collective."""

import argparse
import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_helix import plugin
from megatron_helix.layers import lending
from megatron_helix.options.parsed import require_flags
from megatron_helix.recording.comm_ledger import Entries
from tests.distributed import tiny_gpt
from tests.lending_case import COPIES, Lending, train
from tests.shared_memory import SharedMemory
from tests.test_parity import FULL_RECOMPUTE, PP2

STEPS = 4
LINEARS, MICRO_BATCHES = 4, 2  # of a layer, of a step
WEIGHTS = ("--sequence-parallel", "--helix-exchange", "weights")
GROUPED = ("--swiglu", "--add-qkv-bias", "--group-query-attention", "--num-query-groups", "2")
STAGES = (*PP2, "--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1")
EVALUATED = ("--eval-interval", "2", "--eval-iters", "1", "--split", "80,20,0")


def _cut(m: int, n: int) -> tuple[str, ...]:
    return ("--helix-m", str(m), "--helix-n", str(n), *WEIGHTS)


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        flags: of its own.
        ranks: how many.
        layers: of a rank.
        passes: in which a weight is gathered, of a micro-batch.
        early: whether gathers are begun as on a GPU.
    """

    flags: tuple[str, ...]
    ranks: int
    layers: int = 2
    passes: int = 2
    early: bool = False


CASES = {
    "2x1, evaluated": Case((*_cut(2, 1), *EVALUATED), 2, early=True),
    "2x2, half precision": Case((*_cut(2, 2), "--bf16"), 4),
    "4x1, gates, biases, grouped queries": Case((*_cut(4, 1), *GROUPED), 4, early=True),
    "recomputed": Case((*_cut(2, 1), *FULL_RECOMPUTE), 2, passes=3),
    "several tokens predicted": Case((*_cut(2, 1), "--mtp-num-layers", "1"), 2, layers=3),
    "four stages on two": Case((*_cut(2, 1), *STAGES), 4),
}


def _traffic(step: Entries) -> Entries:
    """Without times, and without what only waits."""
    counted = {key: replace(entry, time_s=0.0) for key, entry in step.items()}
    return {key: entry for key, entry in counted.items() if key[1] != "barrier"}


@pytest.mark.parametrize("name", CASES)
def test_lent_shards_train_to_the_last_bit_without_a_collective(
    corpus_prefix: Path, name: str
) -> None:
    case = CASES[name]
    flags = tiny_gpt(corpus_prefix, *case.flags, train_iters=STEPS)
    alone, together = (
        train(flags, case.ranks, memory=memory, early=case.early) for memory in (None, SharedMemory)
    )
    weights = case.layers * LINEARS
    gathers = weights * MICRO_BATCHES * case.passes
    for sent, copied in zip(alone, together, strict=True):
        assert copied.curve == sent.curve
        assert len(copied.curve.grad_norms) == STEPS
        assert sent == replace(sent, lent=0, settled=0, copied=[0] * STEPS, sent=[gathers] * STEPS)
        assert (copied.lent, copied.settled) == (weights, STEPS)
        assert copied.copied == [0, *[gathers] * (STEPS - 1)]
        assert bool(copied.between) == (EVALUATED[0] in case.flags)
        assert copied.sent == [gathers, *[0] * (STEPS - 1)]
        for step in range(1, STEPS):
            assert _traffic(copied.traffic[step]) == _traffic(sent.traffic[step])
    assert any(lent.curve.losses for lent in together)


def _untouched(found: list[Lending]) -> bool:
    return not any(rank.lent or sum(rank.copied) for rank in found)


def test_layers_that_keep_nothing_are_lent(corpus_prefix: Path) -> None:
    """Beside one that keeps its weights for a step, and gathers them by a collective."""
    kept = ("--helix-gather", "once", "--helix-gather-layers", "1")
    flags = tiny_gpt(corpus_prefix, *_cut(2, 1), *kept, train_iters=STEPS)
    alone, together = (train(flags, 2, memory=memory) for memory in (None, SharedMemory))
    anew = LINEARS * MICRO_BATCHES * 2
    for sent, copied in zip(alone, together, strict=True):
        assert copied.curve == sent.curve
        assert copied.lent == LINEARS
        assert copied.copied == [0, *[anew] * (STEPS - 1)]
        assert copied.sent == [anew + LINEARS, *[LINEARS] * (STEPS - 1)]


NOTHING = {
    "told so": ("--helix-gather-by", "nccl"),
    "a distributed optimizer": ("--use-distributed-optimizer",),
    "kept for a step": ("--helix-gather", "step"),
    "kept whole": ("--helix-gather", "once"),
    "another exchange": ("--helix-exchange", "activations"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_lent(corpus_prefix: Path, name: str) -> None:
    flags = tiny_gpt(corpus_prefix, *_cut(2, 1), *NOTHING[name], train_iters=2)
    assert _untouched(train(flags, 2, memory=SharedMemory))


class Unshared(SharedMemory):
    """That of a rank which cannot map the others'."""

    def place(self, *of_it: Any) -> Any:
        """As the parent's, but on one rank."""
        placed = super().place(*of_it)
        if self.group.rank() == 1:
            raise RuntimeError("the second rank shares no memory")
        return placed


def test_nothing_is_gathered_from_where_one_rank_cannot_read(corpus_prefix: Path) -> None:
    flags = tiny_gpt(corpus_prefix, *_cut(2, 1))
    alone, together = (train(flags, 2, memory=memory) for memory in (None, Unshared))
    assert [rank.curve for rank in together] == [rank.curve for rank in alone]
    assert not any(sum(rank.copied) or rank.settled for rank in together)


def test_a_users_own_end_of_a_step_comes_after() -> None:
    calls: list[Any] = []
    flags = {"use_distributed_optimizer": False, "overlap_param_gather": False}
    args = argparse.Namespace(rank=0, helix_gather_by="copies", **flags)
    finalize = plugin._finalize_model_grads(args, lambda *of, **named: calls.append((of, named)))
    finalize([], 3, pg_collection="groups")
    assert calls == [(([], 3), {"pg_collection": "groups"})]
    assert copy.deepcopy(finalize) is finalize  # configs are copied, and what is lent is not


@pytest.mark.parametrize(
    ("flags", "lends"),
    [
        (COPIES, True),
        ((), False),
        ((*COPIES, "--use-distributed-optimizer"), False),
        ((*COPIES, "--use-distributed-optimizer", "--overlap-param-gather"), False),
    ],
)
def test_what_changes_between_steps_alone_may_be_lent(flags: tuple[str, ...], lends: bool) -> None:
    args = require_flags([*tiny_gpt(Path("corpus")), *_cut(2, 1), *flags])
    assert lending.may_lend(argparse.Namespace(**vars(args))) == lends

"""Gathers begun beside compute: as on a GPU, on CPU ranks that are told to begin early too."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_helix.exchange import gathered_weight, shards
from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.experiment.metrics import RunMetrics
from tests.covering import THOROUGH
from tests.distributed import pretrain_launched, tiny_gpt

FULL = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
MLP = (
    *("--recompute-granularity", "selective", "--recompute-modules", "mlp"),
    "--disable-bias-linear",  # a bias that comes out of a checkpoint is no leaf any more, in stock
)
STEP = ("--helix-gather", "step")
ONE = (*STEP, "--helix-gather-layers", "1")
OVERLAP = (*("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),)
MICRO_BATCHES = 2


def _run(corpus: Path, folder: Path, *flags: str) -> RunMetrics:
    cut = ("--helix-m", "2", "--helix-n", "2", "--helix-exchange", "weights")
    argv = tiny_gpt(corpus, "--sequence-parallel", *cut, *flags, train_iters=1)
    return pretrain_launched(argv, 4, folder)


# Two layers of four linears. Late is what starts a forward pass, and under recompute what follows a
# border; what starts a backward pass is begun in front of another GEMM of its own linear. Across a
# border all four are begun at once: three gathers fewer, as NCCL counts them.
@pytest.mark.parametrize(
    ("flags", "late", "early", "fewer"),
    [
        pytest.param((), 1, 7 + 8, 3 + 3, id="plain"),
        pytest.param(FULL, 1 + 2 * 1, 7 + 2 * (3 + 4), 3, id="full-recompute"),
        pytest.param(MLP, 1 + 2 * 1, 7 + 2 * (1 + 4), 3, id="mlp-recompute", marks=THOROUGH),
        pytest.param(STEP, 1, 7, 3, id="step", marks=THOROUGH),
        pytest.param(
            *(ONE, 1, 3 + MICRO_BATCHES * 8, MICRO_BATCHES * 3),
            id="step-of-one-layer",
            marks=THOROUGH,
        ),
        pytest.param(
            *((*ONE, *FULL), 1 + MICRO_BATCHES, 3 + MICRO_BATCHES * (4 + 3 + 4), MICRO_BATCHES * 3),
            id="step-of-one-layer-full-recompute",
            marks=THOROUGH,
        ),
        # Megatron brings the shards up to date as the forward pass reaches them.
        pytest.param(OVERLAP, 8, 8, 3, id="overlapped-parameter-gather", marks=THOROUGH),
    ],
)
def test_an_early_gather_is_the_next_one_and_moves_nothing_more(
    corpus_prefix: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    late: int,
    early: int,
    fewer: int,
) -> None:
    synchronous = _run(corpus_prefix, tmp_path / "synchronous", *flags)
    start, uses = gathered_weight._gathers, tmp_path / "uses"

    def note(weight: GatheredWeight, word: str) -> None:
        if weight.shard.dim() > 1:  # a bias is gathered when it is added
            with uses.open("a") as file:
                file.write(f"{word}\n")

    def whole(weight: GatheredWeight) -> object:
        if weight._kept is None:
            note(weight, "early" if weight._coming else "late")
        return original(weight)

    def begun(weights: Sequence[GatheredWeight]) -> object:
        for place, weight in enumerate(weights):
            note(weight, "with another" if place else "begun")
        return start(weights)

    original = GatheredWeight.whole
    monkeypatch.setattr(shards, "runs_beside_compute", lambda _shard: True)
    monkeypatch.setattr(GatheredWeight, "whole", whole)
    monkeypatch.setattr(gathered_weight, "_gathers", begun)
    ahead = _run(corpus_prefix, tmp_path / "ahead", *flags)

    assert ahead.losses == synchronous.losses
    assert ahead.grad_norms == synchronous.grad_norms
    assert ahead.sent_bytes == synchronous.sent_bytes
    passes = 4 * (1 if flags[:2] == STEP else MICRO_BATCHES)  # ranks, and what each does alike
    counts = Counter(uses.read_text().splitlines())
    assert +counts == +Counter(
        {
            "late": passes * late,
            "early": passes * early,
            "begun": passes * (late + early - fewer),
            "with another": passes * fewer,
        }
    )

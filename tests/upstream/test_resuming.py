"""A checkpoint's schedule of learning rates and a run's own: told apart before any rank starts."""

from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt
from megatron_helix.basics.errors import UserError
from megatron_helix.fuzz.session import CallFailed
from tests.distributed import living_ranks, pretrain, tiny_gpt

SAVED = 2  # steps


@pytest.fixture(scope="module")
def checkpoint(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    save = ("--save", str(folder), "--save-interval", str(SAVED))
    pretrain(tiny_gpt(corpus_prefix, *save, train_iters=SAVED), 1)
    return folder


OVERRIDE = "add --override-opt-param-scheduler to go on with", r"class input .* do not match"
GROUPS = "give the checkpoint's --lr and --min-lr, by which", "Could not find parameter group"
OTHERS = [
    (("--train-iters", "3"), *OVERRIDE),
    (("--train-iters", "3", "--lr-decay-iters", "2"), *OVERRIDE),
    (("--lr-warmup-iters", "1"), *OVERRIDE),
    (("--lr", "2e-3"), *GROUPS),
]


@pytest.mark.parametrize(("others", "remedy", "said"), OTHERS)
def test_what_megatron_would_refuse_is_refused_in_a_line(
    corpus_prefix: Path,
    checkpoint: Path,
    others: tuple[str, ...],
    remedy: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And Megatron would refuse it, with what it says."""
    flags = tiny_gpt(corpus_prefix, "--load", str(checkpoint), *others, train_iters=SAVED)
    with pytest.raises(UserError, match=rf"^--load: the schedule .*; {remedy}"):
        pretrain_gpt.prepare(flags, 1)
    monkeypatch.setattr(pretrain_gpt.resuming, "require_schedule", lambda *asked: None)
    argv = pretrain_gpt.prepare(flags, 1)
    with pytest.raises(CallFailed, match=said):
        living_ranks().call(pretrain_gpt.train, argv, ranks=1)


def test_what_differs_is_named(corpus_prefix: Path, checkpoint: Path) -> None:
    flags = tiny_gpt(corpus_prefix, "--load", str(checkpoint), train_iters=SAVED + 1)
    with pytest.raises(
        UserError, match=r"\(lr_decay_steps 24, there 16, wd_incr_steps 24, there 16\)"
    ):
        pretrain_gpt.prepare(flags, 1)


@pytest.mark.parametrize(
    ("steps", "more", "trained"),
    [
        (SAVED, (), 0),
        (SAVED + 1, ("--override-opt-param-scheduler",), 1),
        (SAVED + 1, ("--use-checkpoint-opt-param-scheduler",), 1),
        (SAVED + 1, ("--finetune",), SAVED + 1),
        (SAVED + 1, ("--no-load-optim",), 1),
    ],
)
def test_what_megatron_takes_is_taken(
    corpus_prefix: Path, checkpoint: Path, steps: int, more: tuple[str, ...], trained: int
) -> None:
    flags = tiny_gpt(corpus_prefix, "--load", str(checkpoint), *more, train_iters=steps)
    assert len(pretrain(flags, 1).losses) == trained


def test_a_batch_that_the_replicas_make_is_known(corpus_prefix: Path, checkpoint: Path) -> None:
    """Without --global-batch-size it is that of all replicas: of two, here."""
    flags = tiny_gpt(corpus_prefix, "--load", str(checkpoint), train_iters=SAVED)
    at = flags.index("--global-batch-size")
    del flags[at : at + 2]
    pretrain_gpt.prepare(flags, 2)
    with pytest.raises(UserError, match=r"lr_decay_steps 8, there 16"):
        pretrain_gpt.prepare(flags, 1)

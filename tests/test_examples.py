"""The loops in ``examples/``, on tiny settings."""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_helix import pretrain_gpt
from tests.distributed import run_distributed

TOLERANCE = 1e-5  # log-probabilities are of order one, sums of some hundred terms in fp32
FOLDER = Path(__file__).parents[1] / "examples" / "grpo"
# Modules of the folder, which a script finds beside it.
OWN = ("grpo", "report", "rows", "seeds", "task")


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, as python has it when it is called by its path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import grpo  # pyright: ignore[reportMissingImports]

    yield grpo
    for name in OWN:
        sys.modules.pop(name, None)


def test_two_turns_of_grpo(grpo: ModuleType, tmp_path: Path) -> None:
    sizes = ("--start", "1", "--turns", "2", "--prompts", "2", "--group", "4", "--width", "64")
    words = ["--out", str(tmp_path), "--ranks", "4", *sizes, "--layers", "1", "--at-once", "4"]
    options, layout = grpo.parsed([*words, "--", *grpo.LAYOUT])
    completed = pretrain_gpt.prepare(grpo.flags(options, layout), options.ranks)
    ranks = run_distributed(_learn, 4, str(FOLDER), options, completed)
    for lines in ranks:
        assert [(one["turn"], one["reward"], one["length"]) for one in lines] == [
            (one["turn"], one["reward"], one["length"]) for one in ranks[0]
        ]
        assert all(0 <= one["reward"] <= 1 and 1 <= one["length"] <= 5 for one in lines)
        # The update finds every token as likely as the rollout that drew it.
        assert all(one["gap"] < TOLERANCE for one in lines)
    kept = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert kept == ranks[0]
    page = grpo.report.write(tmp_path, [tmp_path]).read_text()
    assert f"| {tmp_path.name} | 2 |" in page
    assert (tmp_path / "curves.svg").stat().st_size > 1000


def test_turns_are_whole_numbers_on_an_axis(grpo: ModuleType) -> None:
    lines = [{"turn": turn, "reward": 0.5, "length": 2.5} for turn in (1, 2, 3)]
    for axes in grpo.report.curves({"run": lines}).axes:
        assert {float(tick) % 1 for tick in axes.get_xticks()} == {0.0}


def _learn(folder: str, *args: object) -> object:
    sys.path.insert(0, folder)
    import grpo  # pyright: ignore[reportMissingImports]

    return grpo.learn(*args)


def test_a_seed_is_equal_until_a_layout_draws_another_token(grpo: ModuleType) -> None:
    import seeds  # pyright: ignore[reportMissingImports]

    def turns(*rewards: float) -> list[dict[str, float]]:
        return [{"turn": n, "reward": one, "length": 4.0} for n, one in enumerate(rewards, 1)]

    found = seeds.summary({"helix": turns(0.1, 0.2, 0.3, 0.5), "stock": turns(0.1, 0.2, 0.4, 0.5)})
    assert found["equal"] == 2
    assert found["reward"]["stock"] == [0.1, 0.2, 0.4, 0.5]


def test_advantages_are_of_a_group(grpo: ModuleType) -> None:
    assert list(grpo.advantages([0.0, 1.0, 0.5, 0.5], 2)) == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", None])
def test_a_reward_that_is_no_number_is_refused(grpo: ModuleType, value: object) -> None:
    with pytest.raises(ValueError, match="reward: must be a finite number, got"):
        grpo.finite(value)


def test_a_bad_reward_is_said_before_there_are_ranks(
    grpo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grpo.task, "reward", lambda prompt, answer: None if answer else 0)
    with pytest.raises(ValueError, match="reward: must be a finite number, got None; correct"):
        grpo.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_rows_hold_every_answer_once(grpo: ModuleType) -> None:
    """What a row's loss is of are the answers' tokens, in order."""
    dice = random.Random(1)
    written = grpo.shown(dice, 9)
    rows = grpo.pack(written, 64)
    assert all(row.tokens.shape == (1, 64) for row in rows)
    labels = torch.cat([row.labels[row.mask > 0] for row in rows])
    assert labels.tolist() == [token for one in written for token in one.answer]
    assert all(int(row.packed.cu_seqlens_q[-1]) == 64 for row in rows)
    before = torch.cat([row.tokens[row.mask > 0] for row in rows])
    assert before.tolist() == [t for one in written for t in [one.prompt[-1], *one.answer[:-1]]]

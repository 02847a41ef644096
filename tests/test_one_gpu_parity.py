"""``benchmarks/one_gpu_parity.py``: what it says of curves, and a set that CPU ranks rehearse."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from megatron_helix.options import parsed, spelling
from tests.covering import THOROUGH
from tests.script_module import ROOT, script_module

STEPS = 2


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script, beside which its modules are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which a run adds to
        yield script_module("benchmarks/one_gpu_parity.py")


def called(script: ModuleType, name: str, out: Path) -> tuple[int, dict[str, Any]]:
    """Its exit code, and what it wrote."""
    with pytest.raises(typer.Exit) as ended:
        script.main(name, out, "cpu", STEPS, 300.0)
    return ended.value.exit_code, json.loads((out / name / "results.json").read_text())


@pytest.fixture(scope="module")
def rehearsed(
    script: ModuleType, corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """The set ``sequence``, on another text than the whole standard library's."""
    out = tmp_path_factory.mktemp("one_gpu")
    give_text(out / "sequence", corpus_prefix)
    return called(script, "sequence", out)


def give_text(folder: Path, prefix: Path) -> None:
    """Put a dataset where a set looks for the standard library's."""
    (folder / "data").mkdir(parents=True)
    for ending in (".bin", ".idx"):
        target = folder / "data" / f"python_stdlib{ending}"
        shutil.copyfile(prefix.with_suffix(ending), target)


def test_cpu_ranks_keep_the_bar(rehearsed: tuple[int, dict[str, Any]]) -> None:
    code, said = rehearsed
    assert code == 0
    assert [(row["layout"], row["good"]) for row in said["rows"]] == [
        ("activations", True),
        ("weights", True),
        ("step", True),
    ]
    curves = said["curves"]
    assert all(len(curve["losses"]) == STEPS for name, curve in curves.items() if "rows" in name)
    # Of other orders of sums, and of other weights: nothing was compared with itself.
    losses = {tuple(curves[f"rows-{name}"]["losses"]) for name in ("tp2", "weights", "fp32")}
    assert len(losses) == 3


def test_a_run_whose_losses_are_changed_misses_it(
    script: ModuleType,
    rehearsed: tuple[int, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curves = {name: script.Curve(**curve) for name, curve in rehearsed[1]["curves"].items()}
    changed = curves["rows-weights"]
    curves["rows-weights"] = replace(changed, losses=[loss * 1.01 for loss in changed.losses])
    found = [(SimpleNamespace(name=name), curve) for name, curve in curves.items()]
    monkeypatch.setattr(script, "curves", lambda *_: found)
    (tmp_path / "sequence").mkdir()
    code, said = called(script, "sequence", tmp_path)
    assert code == 1
    assert [row["good"] for row in said["rows"]] == [True, False, True]


@THOROUGH
def test_packed_rows_keep_the_bar(script: ModuleType, tmp_path: Path) -> None:
    code, said = called(script, "packed", tmp_path)
    assert code == 0
    assert [row["rows"] for row in said["rows"]] == ["documents"] * 3 + ["sft"] * 3


@THOROUGH
def test_a_batch_split_keeps_the_bar(
    script: ModuleType, corpus_prefix: Path, tmp_path: Path
) -> None:
    give_text(tmp_path / "batch", corpus_prefix)
    code, said = called(script, "batch", tmp_path)
    assert code == 0
    layouts = [row["layout"] for row in said["rows"]]
    assert layouts == ["activations", "weights", "step", "once", "layer"]
    recorded = tmp_path / "batch" / "rows-step" / "metrics" / "rank00.jsonl"
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [("flops" in line, "profile" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


def judged(script: ModuleType, name: str, **given: Any) -> list[bool]:
    """Whether rows are good, where every run has one curve but for those ``given``."""
    usual = script.Curve(losses=(4.0, 3.0), norms=(1.0, 2.0), by_gaps=True)
    curves = dict.fromkeys(names(script, name), usual)
    for run, values in given.items():
        key = run.replace("_", "-", 1)
        assert key in curves
        curves[key] = replace(usual, **values)
    return [row["good"] for row in script.rows(name, curves, "cuda")]


def names(script: ModuleType, name: str) -> Sequence[str]:
    """The runs that a set's comparisons name."""
    verdicts = script_module("benchmarks/one_gpu_verdicts.py")
    return [each for row in verdicts.COMPARISONS[name]("cuda") for each in row.names]


@pytest.mark.parametrize("name", ["fp8", "batch", "sequence", "graphs"])
def test_what_is_compared_is_trained_by_flags_that_exist(
    script: ModuleType, name: str, corpus_prefix: Path, tmp_path: Path
) -> None:
    give_text(tmp_path, corpus_prefix)
    sets = script_module("benchmarks/one_gpu_sets.py")
    trainings = [*sets.SETS[name](script.Bench(tmp_path, "cuda", None, Console(quiet=True)))]
    known = [training.name for training in trainings if not training.is_first]
    assert sorted(set(known)) == sorted(set(names(script, name))) == sorted(known)
    for training in trainings:
        spelling.require_spelt(training.flags)
        parsed.require_known(training.flags)


def test_fp8(script: ModuleType) -> None:
    stock = {f"{recipe}_tp2": {"losses": (4.1, 3.1)} for recipe in ("delayed", "blockwise")}
    stock["tensorwise_tp2"] = {"losses": (4.2, 3.0)}
    near, far = {"losses": (3.86, 3.14)}, {"losses": (3.84, 3.16)}
    others = [True] * 10  # `step`, and those of delayed, of blockwise, of bf16
    found = judged(script, "fp8", **stock, tensorwise_activations=near, tensorwise_weights=far)
    assert found == [True, False, *others]
    skips = {**near, "skipped": 1}
    assert judged(script, "fp8", **stock, tensorwise_weights=skips) == [True, False, *others]


@pytest.mark.parametrize("what", ["losses", "norms"])
def test_graphs_are_held_to_the_last_bit(script: ModuleType, what: str) -> None:
    assert judged(script, "graphs") == [True] * 4
    changed = {what: (4.0, 3.0000000000000004)}
    assert judged(script, "graphs", activations_local=changed) == [False, True, True, True]
    assert judged(script, "graphs", weights_none=changed) == [True, True, True, False]


def test_on_a_gpu_a_sequence_split_is_gap_by_gap(script: ModuleType) -> None:
    stock = {"rows_fp32": {"losses": (4.1, 3.1), "norms": (1.1, 2.1)}}
    assert judged(script, "sequence", **stock) == [True, True, True]
    assert judged(script, "sequence", **stock, rows_weights={"by_gaps": False}) == [
        True,
        False,
        True,
    ]


def test_a_run_that_fails_misses_the_bar_and_says_why(script: ModuleType, tmp_path: Path) -> None:
    lines = tmp_path / "steps.jsonl"
    step = {"loss": 4.0, "norm": 1.0, "skipped": False, "by_gaps": False}
    lines.write_text(json.dumps(step) + "\n")
    whole = script.Curve(losses=(4.0, 3.0))
    turns = script_module("benchmarks/one_gpu_turns.py")
    for steps, failed in ((2, "1 steps of 2"), (1, "")):
        assert turns.read(lines, steps).failed == failed
    lines.write_text(json.dumps({**step, "loss": float("nan")}) + "\n")
    assert turns.read(lines, 1).failed == "a loss is no number"
    runs = {**dict.fromkeys(names(script, "graphs"), whole)}
    runs["weights-none"] = replace(whole, failed="a rank failed")
    *others, last = script.rows("graphs", runs, "cuda")
    assert all(row["good"] for row in others)
    assert (last["good"], last["failed"]) == (False, "weights-none: a rank failed")


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("paked", "cpu", "SET: must be one of fp8, packed, batch, sequence, graphs, got paked"),
        ("graphs", "cpu", "--device: graphs must have a GPU, got cpu"),
        ("packed", "cuda", "--device: cuda must have a GPU, and torch sees none"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: str,
    said: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        script.main(name, tmp_path, device, None, 1.0)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")

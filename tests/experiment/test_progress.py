"""What is looked at while ranks have the cores to themselves."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_helix.experiment import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that :mod:`progress` sees."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def append(folder: Path, rank: int, text: str) -> None:
    """Write more to a rank's file."""
    with (folder / f"rank{rank:02d}.jsonl").open("a") as file:
        file.write(text)


def test_steps_are_those_of_the_slowest_rank(tmp_path: Path, clock: list[float]) -> None:
    told: list[int] = []
    look = progress.Steps(tmp_path / "metrics", told.append)
    look()
    (tmp_path / "metrics").mkdir()
    for first, second in (("{}\n", ""), ("{}\n{", "{}\n"), ("}\n", "{}\n{}\n{}\n")):
        append(tmp_path / "metrics", 0, first)
        append(tmp_path / "metrics", 101, second)
        clock[0] += 1
        look()
    assert told == [0, 0, 1, 3]


def test_what_was_read_is_not_read_again(tmp_path: Path, clock: list[float]) -> None:
    told: list[int] = []
    look = progress.Steps(tmp_path, told.append)
    append(tmp_path, 0, "{}\n{}\n")
    look()
    (tmp_path / "rank00.jsonl").write_text("------{}\n")  # the lines that it has seen are gone
    clock[0] += 1
    look()
    assert told == [2, 3]


def test_files_are_looked_at_twice_a_second_at_most(tmp_path: Path, clock: list[float]) -> None:
    told: list[int] = []
    look = progress.Steps(tmp_path, told.append)
    for _ in range(40):
        look()
        clock[0] += 0.1  # as often as the launcher polls
    assert 4 <= len(told) <= 8


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_runs_beside_what_forks_ranks(terminal: bool) -> None:
    """Neither a thread, whose locks a fork would inherit, nor, unseen, any counting of steps."""
    before = len(list(Path("/proc/self/task").iterdir()))
    log = io.StringIO()
    console = Console(file=log, force_terminal=terminal, width=100)
    with progress.shown(console, {"execution_monitoring/a": 3}) as (notify, advance):
        notify("execution_monitoring/a", "started")
        assert (advance is not None) is terminal
        if advance:
            advance("execution_monitoring/a", 2)
            assert "2/3" in log.getvalue()
        assert len(list(Path("/proc/self/task").iterdir())) == before
        notify("execution_monitoring/a", "done")
    assert ("3/3" in log.getvalue()) is terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_no_time_is_folded_and_runs_are_numbered(
    terminal: bool, clock: list[float]
) -> None:
    log = io.StringIO()
    console = Console(file=log, force_terminal=terminal, width=100, legacy_windows=False)
    totals = {f"execution_monitoring/{name}": 5 for name in ("kept", "slow", "last")}
    with progress.shown(console, totals) as (notify, _):
        notify("execution_monitoring/kept", "kept")
        for name, seconds in (
            ("input_preparation", 3.0),
            *((f"device_mapping/{number}", 0.1) for number in range(4)),
            ("execution_monitoring/slow", 12.0),
            ("report", 0.0),
            ("execution_monitoring/last", 0.2),
        ):
            notify(name, "started")
            clock[0] += seconds
            notify(name, "done")
    if not terminal:
        assert log.getvalue().splitlines() == [
            "input_preparation: 3 s",
            "2 of 3, slow: 5 steps, 12 s, 1 left",
            "3 of 3, last: 5 steps, 0 s",
            "1 nodes kept, 5 nodes done at once",
        ]
        return
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", log.getvalue()).splitlines()
    final = [line.split()[0] for line in screen[-4:]]
    assert final == ["input_preparation", "2", "3", "1"]
    assert screen[-1] == "1 nodes kept, 5 nodes done at once"
    assert re.match(r"2 of 3, slow .* 5/5 ", screen[-3])

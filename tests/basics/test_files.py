"""Files that a later run reads: whole or not there, and one line where somebody spoilt them."""

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megatron_helix import workflow
from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import results
from megatron_helix.report import report
from tests.experiment_case import Values, experiment

PACKAGE = Path(files.__file__).parents[1]
TORN = r"was torn or edited, and is not JSON \(.*\); "


def test_a_file_that_is_written_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for text in ("first", "second ∑"):
        files.write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_written_is_as_readable_as_others(tmp_path: Path) -> None:
    files.write(tmp_path / "one", "")
    (tmp_path / "other").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "results.json"
    files.write(path, "whole")

    def interrupted(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        files.write(path, "torn")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_its_name_only_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    path = tmp_path / "results.json"
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((os.fstat(file).st_size, path.exists()))
    )
    files.write(path, "12345")
    assert synced == [(5, False)]


def test_the_package_writes_in_one_piece_everywhere() -> None:
    """But for what no later run reads: a line for torchrun, and texts of one run of the fuzzer."""
    own = {"basics/errors.py", "basics/files.py", "fuzz/training.py"}
    for module in PACKAGE.rglob("*.py"):
        inside = str(module.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and inside not in own:
                called = ast.unparse(node.func)
                assert not called.endswith((".write_text", ".write_bytes", "json.dump")), inside


def test_files_of_more_than_a_hundred_ranks_come_in_their_order(tmp_path: Path) -> None:
    assert files.of_ranks(tmp_path / "missing", ".json") == []
    for rank in (100, 11, 9, 101, 0):
        (tmp_path / f"rank{rank:02d}.json").touch()
        (tmp_path / f"rank{rank:02d}.jsonl").touch()
    for name in (".lock", "ranks.json", "rank01.json.part", "rank.json"):
        (tmp_path / name).touch()
    found = [file.name for file in files.of_ranks(tmp_path, ".json")]
    assert found == [f"rank{rank:02d}.json" for rank in (0, 9, 11, 100, 101)]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(
            UserError, match=r"^--out: .* must be a folder to write in: Is a dir.*; name"
        ),
        files.locked(tmp_path, "--out"),
    ):
        pass


TEAR: list[Callable[[str], str]] = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: text.replace(":", "", 1),
    lambda text: "[1]",
    lambda text: '{"runs": [{"name": 1}], "checks": [1], "key": 0, "value": 0, "files": []}',
]


@pytest.mark.parametrize("tear", TEAR)
@pytest.mark.parametrize("name", ["experiment.json", "results.json", "verification.json"])
def test_a_spoilt_result_is_one_line_that_says_what_to_do(
    finished: tuple[Path, Values], tmp_path: Path, name: str, tear: Callable[[str], str]
) -> None:
    for other in ("experiment.json", "results.json", "verification.json"):
        shutil.copy(finished[0] / other, tmp_path / other)
    path = tmp_path / name
    path.write_text(tear(path.read_text()))
    with pytest.raises(UserError, match=rf"^{path}: .*call `helix run EXPERIMENT --out") as said:
        results.read(tmp_path)
    assert len(str(said.value).splitlines()) == 1


def test_a_spoilt_record_of_a_node_is_one_line_that_says_what_to_do(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    path = out / "nodes" / "deployment_verification.json"
    whole = path.read_text()
    for tear in TEAR:
        path.write_text(tear(whole))
        match = rf"^{path}: .*; remove it: the next `helix run`"
        with pytest.raises(UserError, match=match) as said:
            workflow.run(experiment(), out, Console(quiet=True))
        assert len(str(said.value).splitlines()) == 1
    path.unlink()  # which is all that there is to do, however it was spoilt
    values = workflow.run(experiment(), out, Console(quiet=True))
    assert values["result_collection"] == finished[1]["result_collection"]
    assert json.loads(path.read_text())["node"] == "deployment_verification"


def test_a_spoilt_partition_is_named_by_the_report(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    path = out / "nodes" / "partitioning_setup" / "tiny-helix_2x2.json"
    path.write_text("{")
    with pytest.raises(UserError, match=rf"^{path}: {TORN}remove it"):
        report.write(out)

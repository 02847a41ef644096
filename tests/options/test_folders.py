"""Folders that flags name: nothing starts from random weights unasked, or fails while it saves."""

from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt
from megatron_helix.basics.errors import UserError
from megatron_helix.options import folders
from tests.distributed import tiny_gpt

HERE = "--load: {0} has no checkpoint yet; this run starts with random weights\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that names a checkpoint."""
    folder = tmp_path / "saved"
    (folder / "iter_0000002").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.mark.parametrize("flags", [(), ("--save", "{0}/other"), ("--exit-on-missing-checkpoint",)])
@pytest.mark.parametrize("make", [True, False])
def test_a_missing_checkpoint_is_refused(
    tmp_path: Path, flags: tuple[str, ...], make: bool
) -> None:
    load = tmp_path / "nothing"
    if make:
        load.mkdir()
    words = ["--load", str(load), *(word.format(tmp_path) for word in flags)]
    with pytest.raises(UserError, match=r"^--load: must be .* has none; correct the path, or leav"):
        folders.require_loaded(words)


def test_nothing_is_prepared_without_it(corpus_prefix: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    flags = tiny_gpt(corpus_prefix, "--load", str(tmp_path / "nothing"), "--save", str(save))
    with pytest.raises(UserError, match=r"^--load: must be a folder that Megatron saved"):
        pretrain_gpt.prepare(flags, 1)
    assert not save.exists()
    pretrain_gpt.prepare(flags, 1, script=True)  # of a checkout: as it always did


def test_a_first_start_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that goes on by the same command."""
    folder = tmp_path / "model"
    words = ["--load", f"{folder}/", "--save", str(folder)]
    folders.require_loaded(words)
    assert capsys.readouterr().out == HERE.format(f"{folder}/")
    monkeypatch.setenv("RANK", "1")
    folders.require_loaded(words)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^--exit-on-missing-checkpoint: .* has none; leave"):
        folders.require_loaded([*words, "--exit-on-missing-checkpoint"])


def test_what_is_there_is_taken(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = str(tmp_path / "nothing")
    for words in (
        (),
        ("--load", str(saved)),
        ("--load", str(saved), "--ckpt-step", "2", "--exit-on-missing-checkpoint"),
        ("--load", nothing, "--pretrained-checkpoint", str(saved)),
        ("--pretrained-checkpoint", str(saved)),
        ("--load", "msc://elsewhere/model"),
        ("--load", nothing, "--non-persistent-ckpt-type", "local"),
    ):
        folders.require_loaded(words)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--load", "{0}", "--ckpt-step", "3"), r"^--load: must have .* --ckpt-step names"),
        (
            ("--load", "{0}/x", "--pretrained-checkpoint", "{0}/x"),
            r"^--pretrained-checkpoint: must be .* has none; correct the path",
        ),
    ],
)
def test_a_checkpoint_that_is_named_must_be_there(
    saved: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        folders.require_loaded([word.format(saved) for word in words])


def test_a_tracker_that_names_what_is_gone_is_said(saved: Path) -> None:
    (saved / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(UserError, match=r"iteration.txt names, and .*iter_0000004 does not exist"):
        folders.require_loaded(["--load", str(saved)])


@pytest.mark.parametrize("flag", [f"--{name}" for name in folders._WRITTEN])
def test_what_cannot_be_written_is_refused_before_any_rank(
    corpus_prefix: Path, tmp_path: Path, flag: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    for bad in (str(file), "/proc/nope"):
        said = rf"^{flag}: {bad} must be a folder that can be made"
        with pytest.raises(UserError, match=said):
            folders.require_written([flag, bad])
        if flag in ("--save", "--helix-metrics"):  # a CPU refuses some of the others anyway
            with pytest.raises(UserError, match=said):
                pretrain_gpt.prepare(tiny_gpt(corpus_prefix, flag, bad), 1)


def test_a_folder_that_takes_no_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--save: /proc must be a folder to write in: "):
        folders.require_written(["--save", "/proc"])

"""``helix pretrain`` as its user sees it."""

import re
import shutil
from pathlib import Path

from typer.testing import CliRunner

from megatron_helix import cli
from tests.distributed import tiny_gpt


def trained(corpus_prefix: Path, *words: str) -> list[str]:
    """The lines that a small training prints on two ranks, which ends well."""
    layout = ("--helix-m", "2", "--helix-n", "1", "--sequence-parallel")
    line = ["pretrain", "--nproc-per-node", "2", *words[:2], "--"]
    result = CliRunner().invoke(cli.app, [*line, *tiny_gpt(corpus_prefix, *layout, *words[2:])])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_losses_are_shown_as_they_come_and_all_else_is_in_the_logs(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    logs, model = tmp_path / "logs", tmp_path / "model"
    save = ("--save", str(model), "--save-interval", "3")
    lines = trained(corpus_prefix, "--logs", str(logs), *save)
    where = f"logs: {logs}, losses in rank01.log"
    assert lines[0] == f"helix 2 x 1 on 2 ranks; {where}"
    assert lines.pop(1).startswith("helix 2x1: exchange activations, split batch, ")  # rank 0's
    losses = lines[1:4]
    for number, line in enumerate(losses, start=1):
        assert re.search(rf"iteration +{number}/ +3 .* lm loss: ", line)
    assert re.fullmatch(r"helix 2 x 1 on 2 ranks: trained in \d+ s", lines[4])
    assert lines[5:] == [
        f"first: {losses[0]}",
        f"last:  {losses[-1]}",
        f"checkpoint: {model / 'iter_0000003'}",
        where,
    ]
    assert (model / "iter_0000003").is_dir()
    assert losses[0] in (logs / "rank01.log").read_text()
    assert "lm loss: " not in (logs / "rank00.log").read_text()


def test_a_run_without_a_folder_names_one(corpus_prefix: Path, tmp_path: Path) -> None:
    profile = ("--helix-profile", "--helix-metrics", str(tmp_path))
    lines = trained(corpus_prefix, "--nproc-per-node", "2", "--log-interval", "4", *profile)
    assert lines[-2].startswith("first: [")  # the only one that Megatron logs
    logs = re.fullmatch(r"logs: (.*), losses in rank01.log", lines[-1])
    assert logs
    said = (Path(logs[1]) / "rank01.log").read_text()
    # What a CPU's user can do nothing about.
    assert not [word for word in ("gpuGetDeviceCount", "confluence", "Mimo") if word in said]
    shutil.rmtree(logs[1])

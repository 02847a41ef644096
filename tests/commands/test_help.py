"""What ``--help`` of every command shows."""

import re
from typing import Any, get_args

import pytest
import typer.main
from typer.testing import CliRunner

from megatron_helix import cli
from megatron_helix.commands import experiment, plan
from megatron_helix.planner import deployment, search
from megatron_helix.report import drawing

GROUP: Any = typer.main.get_command(cli.app)
CHOICES = {
    ("plan", "--phase"): "[train|forward|prefill|decode]",
    ("plan", "--rank-by"): "[tps|tpot|memory]",
    ("dag", "--format"): "[mermaid|dot|svg]",
    ("calibrate", "--device"): "[auto|cpu|cuda]",
}


def shown(*words: str) -> str:
    result = CliRunner().invoke(cli.app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("words", [(), *((name,) for name in GROUP.commands)], ids=str)
def test_switches_show_no_type_and_sentences_no_break(words: tuple[str, ...]) -> None:
    said = shown(*words)
    assert "<bool>" not in said
    assert "--help" in said
    command = GROUP.commands[words[0]] if words else GROUP
    for paragraph in command.help.split("\n\n"):
        assert paragraph[:150] in re.sub(r"\s+", " ", said)
        assert "\n" not in paragraph


@pytest.mark.parametrize(("command", "option"), CHOICES)
def test_names_that_may_be_given_are_shown_and_no_others_taken(command: str, option: str) -> None:
    names = CHOICES[command, option]
    words = re.split(r"\W+", names.strip("[]"))
    assert all(word in shown(command) for word in words)
    refused = CliRunner().invoke(cli.app, [command, option, "luck"])
    assert refused.exit_code == 2


def test_they_are_all_names_that_there_are() -> None:
    assert get_args(plan.Phase) == deployment.PHASES
    assert get_args(plan.Ranking) == tuple(search.RANKINGS)
    assert get_args(experiment.Format) == tuple(drawing.FORMATS)

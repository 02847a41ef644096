"""The table of ``helix plan`` on a terminal of 80 columns."""

import re

import pytest
from typer.testing import CliRunner

from megatron_helix import cli

NAMED = ("helix_8x1_weights_once_mb32", "tp8_mb4", "tp4_dp2_mb1")


def planned(model: str, *words: str) -> str:
    line = ["plan", "--model", f"configs/models/{model}.yaml", *words]
    line += ["--hardware", "configs/hardware/h100_2x8_ib.yaml"]
    result = CliRunner().invoke(cli.app, line, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_a_layout_stands_in_one_word_beside_its_figures() -> None:
    said = planned("dense", "--devices", "8", "--layout", NAMED[0], "--layout", NAMED[1])
    for name in NAMED[:2]:
        assert re.search(rf"^ *{name} +[\d,]+ .* (compute|memory|link)", said, re.MULTILINE)


def test_the_title_names_the_devices_that_are_planned_for() -> None:
    words = ("--layout", NAMED[1])
    assert "8 devices of 2 x 8 H100, InfiniBand" in " ".join(
        planned("dense", "--devices", "8", *words).split()
    )
    assert "devices of" not in planned("dense", "--layout", "tp8_pp2_mb4")


@pytest.mark.parametrize("how", ["--layout", "--explain"])
def test_a_small_model_needs_more_than_no_memory(how: str) -> None:
    said = planned("tiny_dense", "--devices", "4", "--batch", "16", "--seq", "64", how, "tp4_mb1")
    assert re.search(r"0\.00\d*[1-9]", said)
    assert not re.search(r" 0\.0 ", said)

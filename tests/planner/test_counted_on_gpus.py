"""Bytes that the ledger counted on GPUs, of layouts of which some run nowhere else, as predicted.

Context parallelism, Megatron FSDP and GTP need a GPU; what :mod:`megatron_helix.planner` says of
them is held against a run of ``configs/experiments/four_gpus_exact.yaml``.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_helix.experiment import config, results, runs
from megatron_helix.verification import expectation

EXPERIMENT = config.load(Path("configs/experiments/four_gpus_exact.yaml"))
COUNTED = {
    row["layout"]: row
    for row in json.loads(Path("benchmarks/results/four_h200_exact.json").read_text())["layouts"]
}


def test_every_layout_of_the_experiment_was_run() -> None:
    assert [*COUNTED] == [layout.name for layout in EXPERIMENT.layouts]


# What was counted of a version that sent otherwise is kept, and said to be so.
CURRENT = [run for run in runs.compared(EXPERIMENT) if "older" not in COUNTED[run.layout.name]]


@pytest.mark.parametrize("run", CURRENT, ids=lambda run: run.layout.name)
def test_ranks_sent_what_was_predicted(run: runs.Run) -> None:
    ranks = range(EXPERIMENT.world_size)
    predicted: dict[str, float] = {}
    for rank in ranks:
        for key, sent in expectation.predicted_bytes(EXPERIMENT, run, rank).items():
            predicted["/".join(key)] = predicted.get("/".join(key), 0.0) + sent / len(ranks)
    assert predicted == COUNTED[run.layout.name]["sent_bytes"]


@pytest.mark.parametrize("row", COUNTED.values(), ids=COUNTED.keys())
def test_what_moves_weights_and_tokens_is_shown_by_its_name(row: dict[str, Any]) -> None:
    sent = results.by_axis(row)
    assert sent.get("other", 0.0) < 1e-3 * sum(sent.values())


def test_losses_are_the_first_layouts() -> None:
    first, *others = (row["losses"] for row in COUNTED.values())
    apart = [results.largest_difference(losses, first) for losses in others]
    assert EXPERIMENT.tolerance.loss is not None
    assert max(apart) < EXPERIMENT.tolerance.loss
    page = " ".join(Path("docs/exactness.md").read_text().split())
    *rivals, across, both = (f"{one:.1e}".replace("e-0", "e-") for one in apart)
    said = "at most {}, {}, {} and {} of themselves from TP=4's".format(*rivals)
    assert f"{said}, helix 4 x 1's {across} and 2 x 2's {both};" in page

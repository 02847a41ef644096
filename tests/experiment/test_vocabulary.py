"""Layouts of any sizes have one vocabulary, which every run and the planner know."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_helix import workflow
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, execution, results, runs, torchrun, vocabulary
from megatron_helix.report import outlook
from megatron_helix.verification import expectation
from tests.covering import THOROUGH
from tests.experiment_case import DOCUMENT, experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
TP1 = {"name": "tp1", "tp": 1, "micro_batch": 1}
# A plan of the model as it is counts more tokens; a run reads bytes.
MODELS = [{**DOCUMENT["models"][0], "vocab_size": 1000, "num_attention_heads": 6}]


def chosen(world_size: int, *layouts: dict[str, Any], **more: Any) -> config.ExperimentConfig:
    """Layouts beside one that is not cut, on so many ranks."""
    common = {
        "models": MODELS,
        "layouts": [TP1, *layouts],
        "world_size": world_size,
        "batch": {"sequences": 6, "sequence_length": 48},
        "decode": {"sequences": 6, "prompt_length": 8, "output_length": 4},
        "hardware": None,
        "claims": [],
        "steps": 2,
        "verification": {**DOCUMENT["verification"], "fp16": None},
    }
    return experiment(**{**common, **more})


def helix(m: int, n: int, **more: Any) -> dict[str, Any]:
    """A layout m x n."""
    return {"name": f"helix_{m}x{n}", "m": m, "n": n, "micro_batch": 2, **more}


@pytest.mark.parametrize(
    ("world_size", "layouts", "more"),
    [
        (3, [helix(3, 1)], {"phases": ["train"]}),
        pytest.param(3, [helix(3, 1)], {}, marks=THOROUGH),
        pytest.param(
            3,
            [helix(1, 3)],
            {"phases": ["train"], "flags": ["--padded-vocab-size=384"]},
            marks=THOROUGH,
        ),
        pytest.param(
            6,
            [
                {"name": "tp2", "tp": 2, "micro_batch": 2},
                helix(3, 2, exchange="weights"),
                helix(6, 1, exchange="activations"),
            ],
            {},
            marks=THOROUGH,
        ),
        pytest.param(
            5,
            [helix(5, 1)],
            {"batch": {"sequences": 10, "sequence_length": 40}, "phases": ["train"]},
            marks=THOROUGH,
        ),
    ],
)
def test_a_size_that_divides_no_power_of_two_is_exact_and_sends_what_is_predicted(
    tmp_path: Path, world_size: int, layouts: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    asked = chosen(world_size, *layouts, **more)
    values = workflow.run(asked, tmp_path, Console(quiet=True))
    assert results.departures(asked, values["result_collection"]) == []
    checks = values["deployment_verification"]
    sent = [check for check in checks if check["check"] == "communication: bytes"]
    assert len(sent) == len(runs.compared(asked))
    assert results.failures(sent) == []
    whole = runs.compared(asked)[0]
    ranks = values[f"execution_monitoring/{whole.name}"]["per_rank"]
    counted = sum(rank["flops"] for rank in ranks)
    assert counted == execution.step_flops(asked, whole)  # with the rows that pad


def test_the_shipped_experiments_need_no_padding() -> None:
    """Powers of two, up to 16: as all that was measured with them."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        experiment = config.load(path)
        counted = {model.vocab_size for model in experiment.models}  # 256, unless it says so
        assert {vocabulary.rows(experiment)} == counted, path


@pytest.mark.parametrize(
    ("layouts", "rows"),
    [([], 256), ([helix(3, 1)], 288), ([helix(2, 1), helix(3, 1)], 288), ([helix(6, 2)], 384)],
)
def test_all_runs_are_padded_alike_as_megatron_pads_the_largest(
    layouts: list[dict[str, Any]], rows: int
) -> None:
    batch = {"sequences": 48, "sequence_length": 48}
    asked = chosen(12, *layouts, phases=["train", "prefill"], batch=batch)
    for run in runs.compared(asked):
        flags = runs.layout_flags(asked, run)
        said = ["--padded-vocab-size", str(rows)]
        assert (flags[flags.index(said[0]) :][:2] == said) if rows > 256 else said[0] not in flags
        assert expectation.deployment(asked, run).vocabulary == rows


def test_another_number_of_rows_is_that_of_the_weights_all_start_from() -> None:
    asked = chosen(3, helix(3, 1), phases=["train"], flags=["--padded-vocab-size", "384"])
    for flags in (
        runs.model_flags(asked, asked.models[0]),
        *(runs.layout_flags(asked, run) for run in runs.compared(asked)),
    ):
        assert flags[flags.index("--padded-vocab-size") :][:2] == ["--padded-vocab-size", "384"]
    assert {expectation.deployment(asked, run).vocabulary for run in runs.compared(asked)} == {384}


@pytest.mark.parametrize("flag", ["--vocab-size=50257", "--tokenizer-type"])
def test_a_launched_run_of_other_tokens_is_padded_as_these_need(flag: str) -> None:
    asked = chosen(3, helix(3, 1), phases=["train"])
    words = torchrun.command(asked, "tiny", "helix_3x1")
    at = words.index("--padded-vocab-size")
    others = torchrun.command(asked, "tiny", "helix_3x1", more=[flag])
    assert others == [*words[:at], *words[at + 2 :], flag]


def test_the_outlook_counts_the_models_own_vocabulary() -> None:
    models = [{**DOCUMENT["models"][0], "vocab_size": size} for size in (256, 100_000)]
    few, many = (
        outlook.rows(
            experiment(
                outlook={
                    **DOCUMENT["outlook"],
                    "experiment": {**DOCUMENT["outlook"]["experiment"], "models": [model]},
                }
            )
        )[0]
        for model in models
    )
    assert many["memory_bytes"] > few["memory_bytes"]


@pytest.mark.parametrize("size", [129, 302])
def test_a_size_that_the_layouts_cannot_share_is_refused(tmp_path: Path, size: int) -> None:
    asked = chosen(3, helix(3, 1), flags=["--padded-vocab-size", str(size)])
    with pytest.raises(UserError, match=f"multiple of 3, for all.*got {size}; leave it out, or us"):
        workflow.run(asked, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()

"""Experiment files: those that are shipped, one's own text, and the error of every bad one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from megatron_helix import corpus, workflow
from megatron_helix.experiment import config, dag, runs
from megatron_helix.planner import memory
from tests.experiment_case import DOCUMENT, experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
QUIET = Console(quiet=True)


def test_the_shipped_experiments_are_sound() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        chosen = config.load(path)
        for run in runs.compared(chosen):
            workflow.expectation.deployment(chosen, run).check()
        assert dag.graph(workflow.nodes(chosen, Path())).number_of_nodes() > 8


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*gpu*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_experiments_fit_their_gpus(path: Path) -> None:
    """With the runs in fp32 that the fp16 check needs."""
    chosen = config.load(path)
    assert chosen.hardware is not None
    for run in [*runs.compared(chosen), *runs.checks(chosen)]:
        here = replace(workflow.expectation.deployment(chosen, run), phase=run.phase).check()
        needed = max(
            memory.of_rank(
                here, stage, fused_channels=chosen.hardware.fused_attention_max_channels
            ).total
            for stage in range(here.stages)
        )
        assert needed < chosen.hardware.memory.rate, run.name


def test_a_layout_that_cannot_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    layouts = [{"name": "bad", "m": 2, "n": 3, "micro_batch": 4}]
    with pytest.raises(ValueError, match=r"tiny, layout bad: .*must be a positive divisor"):
        workflow.run(experiment(layouts=layouts, claims=[]), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_more_flags_go_to_training_and_prefill() -> None:
    chosen = experiment(flags=["--clip-grad", "0.5"])
    for run in runs.compared(chosen):
        assert runs.layout_flags(chosen, run)[-2:] == ["--clip-grad", "0.5"]


def test_what_is_compared_in_training_is_sampled() -> None:
    """Prefill, decode and the runs of the fp16 check are not."""
    chosen = experiment(samples={"interval": 2, "prompts": "asked.txt"})
    every = [*runs.compared(chosen), *runs.checks(chosen)]
    sampled = [run for run in every if "--helix-sample-prompts" in runs.layout_flags(chosen, run)]
    assert sampled == [run for run in runs.compared(chosen) if run.phase == "train"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"phases": ["prefill"]}, "samples: need the phase train, got prefill"),
        (
            {"layouts": [{"name": "sharded", "tp": 1, "fsdp": "torch_fsdp2", "micro_batch": 1}]},
            "samples: layouts must be able to generate while they train, and sharded cannot",
        ),
    ],
)
def test_samples_that_no_run_can_give_are_refused(changed: dict[str, Any], said: str) -> None:
    asked = {"interval": 2, "prompts": "asked.txt"}
    with pytest.raises(ValueError, match=said):
        experiment(samples=asked, claims=[], **changed)


@pytest.mark.parametrize("flag", ["--train-iters", "--train-iters=3"])
def test_flags_that_other_keys_set_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"flags: {flag} is set by the experiment's other keys"):
        workflow.run(experiment(flags=[flag]), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "cuda", "launcher": {"kind": "torchrun"}}, "cuda needs 4 GPUs .*, found [01]"),
        ({"launcher": {"kind": "slurm"}}, "launcher.kind: slurm needs srun and an allocation"),
    ],
)
def test_what_this_machine_has_not_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=said):
        workflow.run(experiment(**changed), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layouts": [{**DOCUMENT["layouts"][0], "name": "a/b"}]}, "layouts: a name must be .*/b'"),
        ({"phases": ["train", "train"]}, "phases: must differ"),
        ({"decode": None}, "decode: must be given with the phase decode"),
        ({"phases": ["train"]}, "decode: needs the phase decode"),
        (
            {"decode": {**DOCUMENT["decode"], "prompt_length": 29}},
            r"decode: prompt_length \+ output_length must fit .* \(32\), got 33",
        ),
        ({"decode": {**DOCUMENT["decode"], "output_length": 2}}, "decode.output_length: Input"),
        ({"precision": "bf16"}, "hardware: four slow ranks has figures for elements of 4 bytes"),
        (
            {"world_size": 8},
            "hardware: four slow ranks has 4 devices .* helix calibrate --device cpu --ranks 8",
        ),
        ({"hardware": {**DOCUMENT["hardware"], "devices": 0}}, "hardware.devices: Input should"),
        ({"phases": ["prefill", "decode"]}, "claims: phase train is not in this experiment"),
        ({"device": "cuda"}, "launcher.kind: must be torchrun or slurm on cuda, got fork"),
        ({"launcher": {"kind": "slurm", "nodes": 3}}, "launcher.nodes: must divide world_size"),
        ({"launcher": {"kind": "fork", "nodes": 2}}, "launcher.nodes: must be 1 with fork"),
        (
            {"layouts": [{**DOCUMENT["layouts"][0], "exchange": "weights"}]},
            r"layouts.0: exchange: must be left out of a stock layout \(tp\), got weights; say m",
        ),
        ({"data": "own"}, "data: must be the prefix of a dataset .*own.bin does not exist; make"),
        (
            {"layouts": [{**DOCUMENT["layouts"][0], "name": "other"}], "claims": []},
            "outlook.experiment: must have a layout of the same name, and has tp2_pp2, helix_2x2",
        ),
        (
            {"layouts": [{**DOCUMENT["layouts"][0], "tp": 4, "pp": 1}], "claims": []},
            "outlook.experiment: tp2_pp2 must be the same layout there, but for micro_batch",
        ),
        (
            {"outlook": {**DOCUMENT["outlook"], "hardware": []}},
            "outlook.hardware: List should have at least 1 item",
        ),
        (
            {"samples": {"interval": 2, "prompts": "asked.txt"}},
            "samples.prompts: must be a text file, got .*asked.txt, which does not exist",
        ),
        ({"samples": {"interval": 0, "prompts": 3}}, "samples.interval: Input should be greater"),
        ({"color": "red"}, "color: Extra inputs are not permitted, got 'red'"),
        ({"batch": {"sequences": 0, "sequence_length": 8}}, "batch.sequences: Input should be"),
    ],
)
def test_a_bad_file_is_named_with_the_path_of_the_key(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps({**DOCUMENT, **changed}))  # JSON is YAML
    with pytest.raises(ValueError, match=f"bad.yaml: {said}"):
        config.load(path)


def test_own_text_lies_beside_the_results_and_a_change_of_it_is_seen(tmp_path: Path) -> None:
    text, prefix, out = tmp_path / "text.txt", tmp_path / "own" / "text", tmp_path / "out"
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({**DOCUMENT, "data": "own/text"}))

    def prepared(words: str) -> tuple[list[str], bytes]:
        text.write_text(words)
        corpus.build([text], prefix)
        states: list[str] = []
        nodes = workflow.nodes(config.load(file), out)
        values = dag.run(nodes[:1], out, lambda name, state: states.append(state))
        path = out / values["input_preparation"]["prefix"]
        return states, path.with_suffix(".bin").read_bytes()

    assert prepared("one") == (["started", "done"], b"one\0")
    assert prepared("one") == (["kept"], b"one\0")
    assert prepared("two") == (["started", "done"], b"two\0")


def test_text_in_larger_tokens_than_bytes_is_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "words.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 300]), [2])
    builder.finalize(str(tmp_path / "words.idx"))
    with pytest.raises(ValueError, match=r"data: must be a dataset of bytes, .*words, whose"):
        corpus.require_dataset(tmp_path / "words", "data")


def test_what_auto_takes_on_the_experiments_machine_is_said_to_the_run() -> None:
    """Calls that take long, or bytes that do: another plan, and the one that is predicted."""
    taken = set()
    for latency, bandwidth in ((1e-3, 1e-3), (1e6, 1e3)):
        links = {
            "bandwidth": {"value": bandwidth, "unit": "GB/s", "source": "made up"},
            "latency": {"value": latency, "unit": "us", "source": "made up"},
        }
        chosen = experiment(
            hardware={**DOCUMENT["hardware"], "intra_node": links},
            layouts=[
                DOCUMENT["layouts"][0],
                {**DOCUMENT["layouts"][1], "m": 4, "n": 1, "exchange": "auto"},
            ],
        )
        run = next(one for one in runs.compared(chosen) if one.layout.is_helix)
        flags = runs.layout_flags(chosen, run)
        plan = workflow.expectation.deployment(chosen, run).plan
        said = flags[flags.index("--helix-exchange") + 1], flags[flags.index("--helix-split") + 1]
        assert said == (plan.exchange, plan.split)
        taken.add(said)
    assert len(taken) == 2

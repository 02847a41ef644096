"""One small experiment from its file to its report, and everything that must make it fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_helix.experiment import (
    config,
    dag,
    decode,
    deployment_graph,
    execution,
    launchers,
    metrics,
    prediction,
    report,
    results,
    runs,
    terminal,
    workflow,
)
from megatron_helix.experiment.config import LauncherConfig
from megatron_helix.planner.traffic import step_bytes, transfers
from tests.experiment_case import DOCUMENT, Values, experiment, of

CONFIGS = Path(__file__).parent.parent / "configs" / "experiments"
QUIET = Console(quiet=True)


def test_every_layout_is_exact_and_every_check_passes(finished: tuple[Path, Values]) -> None:
    _, values = finished
    found, checks = values["result_collection"], values["deployment_verification"]
    assert results.departures(experiment(), found) == []
    assert results.failures(checks) == []
    kinds = {check["check"] for check in checks}
    assert kinds == {
        *("mapping", "fp16", "communication: bytes", "communication: time"),
        *("load", "load: KV cache"),
    }
    for run, judged in (("tiny-helix_2x2", 5), ("tiny-helix_2x2-decode", 2)):
        passed = [check["passed"] for check in checks if check["run"] == run]
        assert passed == [True] * judged


def test_results_are_what_a_program_reads(finished: tuple[Path, Values]) -> None:
    out, _ = finished
    found = json.loads((out / "results.json").read_text())["runs"]
    assert [result["layout"] for result in found] == ["tp2_pp2", "helix_2x2"] * 3
    phases = ["train"] * 2 + ["prefill"] * 2 + ["decode"] * 2
    assert [result["phase"] for result in found] == phases
    for result in found:
        assert result["source"] == "measured"
        assert result["tokens_per_s"] > 0
        assert "per_rank" not in result
    for result in results.trained(found):
        assert len(result["losses"]) == 4
        assert set(result["breakdown_ms"]) == set(metrics.PARTS)
    assert found[2]["losses"][0] == found[0]["losses"][0]  # the same forward pass
    assert found[2]["grad_norms"] == []
    idle = [result["breakdown_ms"]["pipeline_idle"] for result in found[:2]]
    assert idle[0] > 0 == idle[1]


def test_decode_measures_what_a_client_sees_alike_for_every_layout(
    finished: tuple[Path, Values],
) -> None:
    stock, helix = results.decoded(finished[1]["result_collection"])
    for result in (stock, helix):
        assert (result["batch"], result["decode_steps"]) == (4, 3)
        assert result["itl_p50_ms"] <= result["itl_p99_ms"]
        assert result["itl_ms"] <= result["itl_p99_ms"]
        assert min(result["ttft_ms"], result["itl_p50_ms"], result["tpot_ms"]) > 0
        # 12 positions, rounded up to 12 or 16; two layers of keys and values of 64 channels, fp32.
        held = sum(result["kv_bytes"])
        assert held / (4 * 2 * 2 * 64 * 4) == 12
    assert (stock["microbatches"], helix["microbatches"]) == (2, 1)
    assert helix["sent_bytes"]["HELIX_DIM_GROUP/all_to_all"] > 0
    assert stock["sent_bytes"]["PIPELINE_MODEL_PARALLEL_GROUP/send"] > 0


@pytest.mark.parametrize("layout", ["tp2_pp2", "helix_2x2"])
def test_decode_that_sends_other_bytes_fails(finished: tuple[Path, Values], layout: str) -> None:
    run = next(run for run in runs.compared(experiment()) if run.name == f"tiny-{layout}-decode")
    cut = of(finished[1], "partitioning_setup", run.name)
    result = of(finished[1], "execution_monitoring", run.name)
    key = "TENSOR_MODEL_PARALLEL_GROUP/all_reduce"
    cut["ranks"][1]["predicted_bytes"][key] += 4
    result["kv_bytes"][0] *= 2
    sent, held = decode.verify(run, cut, result, experiment().verification)
    assert sent["passed"] is False
    assert sent["detail"].startswith(f"{key}: ")
    assert held["passed"] is (False if layout == "helix_2x2" else None)


def test_predictions_stand_beside_measurements(finished: tuple[Path, Values]) -> None:
    found = finished[1]["result_collection"]
    for run, result in zip(runs.compared(experiment()), found, strict=True):
        predicted = result["predicted"]
        assert predicted == prediction.of_run(experiment(), run)
        assert (predicted["source"], predicted["hardware"]) == ("predicted", "four slow ranks")
        error = prediction.error(result, "tokens_per_s")
        assert result["tokens_per_s"] * (1 + error) == pytest.approx(predicted["tokens_per_s"])
    *_, table = terminal.tables(found)
    assert table.title == "Predicted for four slow ranks, and measured"
    assert table.row_count == len(found)
    plain = [{**result, "predicted": None} for result in found]
    assert len(terminal.tables(plain)) == 2  # training and prefill, and decode


def test_flops_of_live_ranks_are_the_formulas(finished: tuple[Path, Values]) -> None:
    out, _ = finished
    asked = {run.name: run for run in runs.compared(experiment())}
    for name in ("tiny-helix_2x2", "tiny-tp2_pp2-prefill"):
        ranks = json.loads((out / "runs" / name / "result.json").read_text())["per_rank"]
        counted = sum(rank["flops"] for rank in ranks)
        assert counted == execution.step_flops(experiment(), asked[name])


def test_a_second_run_does_nothing(finished: tuple[Path, Values]) -> None:
    out, values = finished
    states: set[str] = set()
    nodes = workflow.nodes(experiment(), out)
    assert dag.run(nodes, out, lambda name, state: states.add(state)) == values
    assert states == {"kept"}


def test_an_interrupt_at_each_node_changes_no_result(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    chosen = experiment(phases=["train"], verification={**DOCUMENT["verification"], "fp16": None})
    started: list[str] = []
    done: list[str] = []
    in_a_run: list[str] = []

    def notify(name: str, state: str) -> None:
        if state == "done":
            done.append(name)
        if state == "started" and name not in started:
            started.append(name)
            raise KeyboardInterrupt

    def advance(name: str, steps: int) -> None:
        if steps >= 1 and name not in in_a_run:
            in_a_run.append(name)
            raise KeyboardInterrupt

    nodes = workflow.nodes(chosen, tmp_path, QUIET, advance)
    values: Values = {}
    while not values:
        try:
            values = dag.run(nodes, tmp_path, notify)
        except KeyboardInterrupt:
            continue
    assert sorted(done) == sorted(node.name for node in nodes)  # each once
    assert len(started) == len(nodes)
    assert len(in_a_run) == 2
    whole = finished[1]["result_collection"][:2]
    for key in ("losses", "grad_norms", "sent_bytes"):
        assert [result[key] for result in values["result_collection"]] == [
            result[key] for result in whole
        ]


def test_the_report_stands_alone_and_separates_claims(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert "Verified:" in page
    assert "context switches" in page  # what times on shared cores are worth
    text = (out / "report.md").read_text()
    assert "TPS, claimed | TPS, predicted | TPS, measured | prediction's error" in text
    assert "| tiny | tp2_pp2 | train | - |" in text
    assert "| tiny | helix_2x2 | train | 123,456 |" in text
    assert "| tiny | helix_2x2 | prefill | - |" in text  # claimed is training
    assert "Predicted for four slow ranks" in text
    assert "inter-token latency ms, mean / p50 / p99" in text
    assert "Claimed figures are those of another machine." in text
    assert all((out / "plots" / name).exists() for name in ("tps_tpot.png", "losses.png"))


def test_without_claims_there_is_no_column_of_them(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out, _ = finished
    copy = tmp_path / "copy"
    copied(out, copy)
    shutil.copytree(out / "nodes", copy / "nodes")
    (copy / "experiment.json").write_text(experiment(claims=[], hardware=None).model_dump_json())
    report.write(copy)
    text = (copy / "report.md").read_text()
    assert "| model | layout | phase | TPS, measured | TPOT ms, measured |" in text
    assert "laimed figures" not in text


def test_comparing_with_itself_finds_no_change(finished: tuple[Path, Values]) -> None:
    out, _ = finished
    made = terminal.compare(out, out)
    assert made.row_count == 6


@pytest.mark.parametrize("what", ["models", "batch", "decode", "steps", "learning_rate"])
def test_unequal_experiments_are_not_compared(
    finished: tuple[Path, Values], tmp_path: Path, what: str
) -> None:
    other = {
        "models": [{**DOCUMENT["models"][0], "ffn_hidden_size": 128}],
        "batch": {"sequences": 16, "sequence_length": 32},
        "decode": {**DOCUMENT["decode"], "output_length": 5},
        "steps": 5,
        "learning_rate": 0.5,
    }
    out = tmp_path / "other"
    copied(finished[0], out)
    (out / "experiment.json").write_text(experiment(**{what: other[what]}).model_dump_json())
    with pytest.raises(ValueError, match=f"compare: {what} must be equal, got"):
        terminal.compare(finished[0], out)


def copied(source: Path, target: Path) -> None:
    """What ``results.read`` needs."""
    target.mkdir()
    for name in ("experiment.json", "results.json", "verification.json"):
        (target / name).write_bytes((source / name).read_bytes())


def test_an_unfinished_experiment_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment\.json is missing; call `helix run"):
        results.read(tmp_path)


@pytest.mark.parametrize("layout", ["tp2_pp2", "helix_2x2", "activations", "sequence", "scores"])
def test_the_deployment_graph_sends_what_is_predicted(layout: str) -> None:
    helix = {"m": 2, "n": 2, "micro_batch": 4}
    more = [
        {"name": "activations", **helix, "exchange": "activations", "split": "batch"},
        {"name": "sequence", **helix, "exchange": "weights", "split": "sequence"},
        {"name": "scores", **helix, "exchange": "scores"},
    ]
    chosen = experiment(layouts=[*DOCUMENT["layouts"], *more])
    made = deployment_graph.build(chosen, layout=layout)
    assert len({data["group"] for _, data in made.nodes(data=True)}) == 4
    run = runs.Run(
        model=chosen.models[0],
        layout=next(item for item in chosen.layouts if item.name == layout),
        phase="train",
        precision="fp32",
    )
    here = workflow.partition.deployment(chosen, run)
    for rank in range(4):
        sent: dict[str, float] = {}
        for _, _, data in made.out_edges([n for n in made if n[0] == rank], data=True):
            if "bytes" in data:
                axis = data.get("axis", "pp")
                sent[axis] = sent.get(axis, 0.0) + data["bytes"] * here.microbatches
        predicted: dict[str, float] = {}
        for moved in transfers(here, rank // 2 if here.stages == 2 else 0, element_bytes=4):
            inside = moved.what not in ("batch", "embedding", "LM head", "losses", "cross entropy")
            if moved.when == "forward" and inside and moved.sent_bytes:
                predicted[moved.axis] = predicted.get(moved.axis, 0.0) + moved.sent_bytes
        assert sent == pytest.approx(predicted), (rank, sent, predicted)


def test_the_shipped_experiments_are_sound() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        chosen = config.load(path)
        for run in runs.compared(chosen):
            workflow.partition.deployment(chosen, run).check()
        assert dag.graph(workflow.nodes(chosen, Path())).number_of_nodes() > 8


def test_a_layout_that_cannot_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    layouts = [{"name": "bad", "m": 2, "n": 3, "micro_batch": 4}]
    with pytest.raises(ValueError, match=r"tiny, layout bad: .*must be a positive divisor"):
        workflow.run(experiment(layouts=layouts, claims=[]), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
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
            "hardware: four slow ranks has 4 devices .* helix calibrate --ranks 8",
        ),
        ({"hardware": {**DOCUMENT["hardware"], "devices": 0}}, "hardware.devices: Input should"),
        ({"phases": ["prefill", "decode"]}, "claims: phase train is not in this experiment"),
        ({"device": "cuda"}, "launcher.kind: must be torchrun or slurm on cuda, got fork"),
        ({"launcher": {"kind": "slurm", "nodes": 3}}, "launcher.nodes: must divide world_size"),
        ({"launcher": {"kind": "fork", "nodes": 2}}, "launcher.nodes: must be 1 with fork"),
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


def test_torchrun_runs_the_same_training(finished: tuple[Path, Values], tmp_path: Path) -> None:
    out, values = finished
    layouts = [{"name": "helix_2x2", "m": 2, "n": 2, "micro_batch": 4}]
    run = runs.compared(experiment(layouts=layouts, phases=["train"], steps=2))[0]
    flags = runs.run_flags(experiment(steps=2), run, out / "data" / "python_stdlib", out)
    flags += ["--helix-metrics", str(tmp_path / "metrics")]
    launchers.launch(LauncherConfig(kind="torchrun"), flags, 4, tmp_path / "logs")
    found = metrics.read(tmp_path / "metrics")
    assert found.losses == values["result_collection"][1]["losses"][:2]


def test_slurm_starts_one_torchrun_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1")
    slurm = LauncherConfig(kind="slurm", nodes=2)
    words = launchers.launch_command(slurm, ["module", "--fp16"], 16, tmp_path)
    assert words[0] == "srun"
    text = " ".join(words)
    for part in (
        "--nodes 2",
        "--nproc-per-node 8",
        "--rdzv-endpoint 10.0.0.1:20007",
        "-m module --fp16",
    ):
        assert part in text


def test_predicted_bytes_of_training_are_the_planners() -> None:
    run = runs.compared(experiment())[1]
    same = step_bytes(run.model, run.layout, experiment().batch, world_size=4, rank=1)
    assert workflow.partition.predicted_bytes(experiment(), run, 1) == same

"""One small experiment from its file to its report, and everything that must make it fail."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from megatron_helix import cli, pretrain_gpt, workflow
from megatron_helix.basics import files
from megatron_helix.commands import experiment as commands
from megatron_helix.experiment import dag, decode, execution, metrics, results, runs, source
from megatron_helix.launching import launchers
from megatron_helix.launching.fork_ranks import RankFailed
from megatron_helix.launching.launcher_config import LauncherConfig
from megatron_helix.planner.traffic import step_bytes, transfers
from megatron_helix.report import deployment_graph, outlook, prediction, terminal
from megatron_helix.verification import expectation
from tests.covering import THOROUGH
from tests.experiment_case import DOCUMENT, FILE, Values, experiment, of

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
        assert result["itl_p99_ms"] is None  # of so few times there is none
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
    *_, table = terminal.tables(experiment(), found)
    assert table.title == "Predicted for four slow ranks, and measured"
    cases = {(result["model"], result["phase"]) for result in found}
    assert table.row_count == len(found) + len(cases)  # a heading each
    plain = [{**result, "predicted": None} for result in found]
    loops = len(experiment().phases) - 1
    without = terminal.tables(experiment(outlook=None), plain)
    assert len(without) == 2 * loops + 1  # what is counted and what is timed, and the decode


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
    nodes = workflow.nodes(experiment(), out, file=FILE)
    assert dag.run(nodes, out, lambda name, state: states.add(state)) == values
    assert states == {"kept"}


def test_an_interrupt_at_each_node_and_a_dead_rank_change_no_result(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    chosen = experiment(phases=["train"], verification={**DOCUMENT["verification"], "fp16": None})
    started: list[str] = []
    done: list[str] = []
    in_a_run: list[str] = []
    failures: list[str] = []
    others = set(multiprocessing.active_children())  # ranks that live for tests of other files

    def notify(name: str, state: str) -> None:
        if state == "done":
            done.append(name)
        if state == "started" and name not in started:
            started.append(name)
            raise KeyboardInterrupt

    def advance(name: str, steps: int) -> None:
        if steps >= 1 and name not in in_a_run:
            in_a_run.append(name)
            if len(in_a_run) == 1:
                raise KeyboardInterrupt
            here = set(multiprocessing.active_children()) - others
            next(process for process in here if process.name == "rank 3").kill()

    nodes = workflow.nodes(chosen, tmp_path, QUIET, advance)
    values: Values = {}
    while not values:
        try:
            values = dag.run(nodes, tmp_path, notify)
        except KeyboardInterrupt:
            continue
        except RankFailed as failure:
            failures.append(str(failure))
    assert sorted(done) == sorted(node.name for node in nodes)  # each once
    assert len(started) == len(nodes)
    assert len(in_a_run) == 2
    (failure,) = failures
    assert failure.startswith("rank 3 of 4 was killed by SIGKILL")
    assert "runs/tiny-helix_2x2/logs/rank03.log" in failure
    whole = finished[1]["result_collection"][:2]
    for key in ("losses", "grad_norms", "sent_bytes"):
        assert [result[key] for result in values["result_collection"]] == [
            result[key] for result in whole
        ]


def test_what_no_run_depends_on_runs_none_again(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    done: list[str] = []
    nodes = workflow.nodes(experiment(peak_tflops=1e-3), out)
    values = dag.run(nodes, out, lambda name, state: done.extend([name] * (state == "done")))
    assert done == ["result_collection", "report"]
    for result in results.trained(values["result_collection"]):
        assert result["mfu"] == pytest.approx(result["tflops_per_device"] / 1e-3)


def test_the_report_names_the_experiment_file_and_another_name_trains_nothing(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    done: list[str] = []
    nodes = workflow.nodes(experiment(), out, file="own.yaml")
    dag.run(nodes, out, lambda name, state: done.extend([name] * (state == "done")))
    assert done == ["result_collection", "report"]
    assert results.read(out)["file"] == "own.yaml"
    for page in ("report.md", "report.html"):
        assert "all of the experiment file own.yaml as it was read" in (out / page).read_text()


def test_changed_code_trains_again_and_a_changed_report_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(Path(cli.__file__).parent, package)
    monkeypatch.setattr(source, "_PACKAGE", package)

    def digests() -> tuple[str, str]:
        return source.of_runs.__wrapped__(), source.whole.__wrapped__()

    before = digests()
    assert digests() == before
    for name, trains in (
        ("report/templates/report.md.j2", False),
        ("verification/verify.py", False),
        ("workflow.py", False),
        ("planner/time.py", False),
        ("experiment/metrics.py", True),
        ("launching/launchers.py", True),
        ("layers/attention.py", True),
    ):
        with (package / name).open("a") as file:
            file.write("# changed")
        after = digests()
        assert after[1] != before[1], name
        assert (after[0] != before[0]) is trains, name
        before = after
    hashed = {node.name: json.dumps(node.inputs) for node in workflow.nodes(experiment(), tmp_path)}
    assert source.of_runs() in hashed["execution_monitoring/tiny-helix_2x2"]
    assert source.of_runs() in hashed["model_loading/tiny"]
    for name in ("partitioning_setup/tiny-helix_2x2", "deployment_verification", "report"):
        assert source.whole() in hashed[name]


def test_a_second_run_at_the_same_time_is_refused(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        with files.locked(out, "--out"):
            there.send("held")
            there.recv()

    holder = context.Process(target=hold)
    holder.start()
    try:
        here.recv()
        with pytest.raises(ValueError, match=f"one run at a time, and process {holder.pid} is at"):
            workflow.run(experiment(), out, QUIET)
    finally:
        here.send("let go")
        holder.join()


def test_a_finished_experiment_is_printed_as_json(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out, values = finished
    file = tmp_path / FILE
    file.write_text(json.dumps(DOCUMENT))  # JSON is YAML
    told = CliRunner().invoke(cli.app, ["run", str(file), "--out", str(out), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {
        "runs": values["result_collection"],
        "outlook": outlook.rows(experiment()),
        "checks": values["deployment_verification"],
        "wrong": [],
    }
    assert " nodes kept" in told.stderr
    assert "verified: " in told.stderr


def test_a_deployment_that_is_not_as_planned_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks swapped, a wrong byte formula and an unbalanced layout, from file to exit code."""
    train, predicted = pretrain_gpt.train, expectation.predicted_bytes

    def swapped(*args: Any) -> None:
        rank = os.environ["RANK"]
        os.environ["RANK"] = {"1": "2", "2": "1"}.get(rank, rank)
        train(*args)

    def wrong(*args: Any) -> dict[Any, float]:
        return {key: sent * 1.01 for key, sent in predicted(*args).items()}

    monkeypatch.setattr(pretrain_gpt, "train", swapped)
    monkeypatch.setattr(expectation, "predicted_bytes", wrong)
    changed = {
        # The LM head is work for the last stage alone.
        "layouts": [{"name": "helix_2x1_pp2", "m": 2, "n": 1, "pp": 2, "micro_batch": 4}],
        "verification": {**DOCUMENT["verification"], "fp16": None},
        **{"phases": ["train"], "steps": 2, "claims": []},
        **{"hardware": None, "decode": None, "outlook": None},
    }
    file = tmp_path / "wrong.yaml"
    file.write_text(json.dumps({**DOCUMENT, **changed}))
    out = tmp_path / "out"
    with pytest.raises(typer.Exit) as ended:
        commands.run(file, out)
    assert ended.value.exit_code == 3
    told = " ".join(capfd.readouterr().out.split())
    text = (out / "report.md").read_text()
    assert "**Not verified:**" in text
    for check, detail in (
        ("mapping", "rank 1 should be on cpu 1 and is on cpu 2"),
        ("communication: bytes", "rank 0, EMBEDDING_GROUP/all_reduce: "),
        ("load", "FLOPs: max/mean 1."),
    ):
        assert f"| {check} | tiny-helix_2x1_pp2 | FAIL | {detail}" in text
        assert f"not verified: {check}, tiny-helix_2x1_pp2: {detail}" in told


@pytest.mark.parametrize(
    "layout", ["tp2_pp2", "helix_2x2", "activations", "sequence", "dealt", "scores"]
)
def test_the_deployment_graph_sends_what_is_predicted(layout: str) -> None:
    helix = {"m": 2, "n": 2, "micro_batch": 4}
    more = [
        {"name": "activations", **helix, "exchange": "activations", "split": "batch"},
        {"name": "sequence", **helix, "exchange": "weights", "split": "sequence"},
        {"name": "dealt", **helix, "m": 4, "n": 1, "exchange": "weights", "split": "sequence"},
        {"name": "scores", **helix, "exchange": "scores"},
    ]
    chosen = experiment(layouts=[*DOCUMENT["layouts"], *more])
    if layout == "dealt":  # positions are added in stock's order, and a stream is there to deal
        learned = {**DOCUMENT["models"][0], "position_embedding_type": "learned_absolute"}
        chosen = experiment(layouts=[*DOCUMENT["layouts"], *more], models=[learned])
    made = deployment_graph.build(chosen, layout=layout)
    assert len({data["group"] for _, data in made.nodes(data=True)}) == 4
    run = runs.Run(
        model=chosen.models[0],
        layout=next(item for item in chosen.layouts if item.name == layout),
        phase="train",
        precision="fp32",
    )
    here = workflow.expectation.deployment(chosen, run)
    for rank in range(4):
        sent: dict[str, float] = {}
        for _, _, data in made.out_edges([n for n in made if n[0] == rank], data=True):
            if "bytes" in data:
                axis = data.get("axis", "pp")
                sent[axis] = sent.get(axis, 0.0) + data["bytes"] * here.microbatches
        predicted: dict[str, float] = {}
        for moved in transfers(here, rank // 2 if here.stages == 2 else 0, rank):
            inside = moved.what not in ("batch", "embedding", "LM head", "losses", "cross entropy")
            if moved.when == "forward" and inside and moved.sent_bytes:
                predicted[moved.axis] = predicted.get(moved.axis, 0.0) + moved.sent_bytes
        assert sent == pytest.approx(predicted), (rank, sent, predicted)


@THOROUGH
def test_torchrun_runs_the_same_training(finished: tuple[Path, Values], tmp_path: Path) -> None:
    out, values = finished
    layouts = [{"name": "helix_2x2", "m": 2, "n": 2, "micro_batch": 4}]
    run = runs.compared(experiment(layouts=layouts, phases=["train"], steps=2, claims=[]))[0]
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
    here = workflow.expectation.deployment(experiment(), run)
    assert here.machine == experiment().hardware
    assert workflow.expectation.predicted_bytes(experiment(), run, 1) == step_bytes(here, 1)

"""What is read of a finished experiment: report, tables in a terminal, progress, comparison."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, progress, results, runs
from megatron_helix.planner.traffic import step_bytes
from megatron_helix.report import comparison, counted, outlook, report, terminal
from megatron_helix.verification import expectation
from tests.experiment_case import DOCUMENT, Values, experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"


def copied(source: Path, target: Path) -> None:
    """What ``results.read`` needs."""
    target.mkdir()
    for name in ("experiment.json", "results.json", "verification.json"):
        (target / name).write_bytes((source / name).read_bytes())


def test_names_stay_whole_in_a_terminal_of_80_columns(finished: tuple[Path, Values]) -> None:
    found = finished[1]["result_collection"]
    for table in terminal.tables(experiment(), found):
        shown = io.StringIO()
        Console(width=80, file=shown).print(table)
        lines = [line.split() for line in shown.getvalue().splitlines()]
        phases = [word for word in ("train", "prefill", "decode") if word in str(table.title)]
        own = [one for one in found if one["phase"] in (phases or [one["phase"]])]
        assert {one["layout"] for one in own} <= {line[0] for line in lines if line}


def test_a_cpu_shows_what_it_can_first_and_its_clocks_last(finished: tuple[Path, Values]) -> None:
    found = finished[1]["result_collection"]
    asked = experiment()

    def shown(on: str) -> list[str]:
        device = asked.model_copy(update={"device": on})
        return [str(table.title) for table in terminal.tables(device, found)]

    on_cpu = shown("cpu")
    assert [title.split(":")[0] for title in on_cpu[:3]] == [
        *("train", "prefill", "predicted for four slow ranks, and claimed")
    ]
    assert [i for i, title in enumerate(on_cpu) if "times of shared cores" in title] == [4, 5]
    assert "(counted)" in on_cpu[0]
    assert "(counted)" in shown("cuda")[-1]


def test_the_first_table_counts_bytes_by_axis_and_weights(finished: tuple[Path, Values]) -> None:
    found = finished[1]["result_collection"]
    for result in found[:2]:
        by_axis = results.by_axis(result)
        assert sum(by_axis.values()) == pytest.approx(sum(result["sent_bytes"].values()))
    assert results.by_axis(found[0]).keys() >= {"tensor", "pipeline"}
    assert results.by_axis(found[1]).keys() >= {"dim", "head"}
    shapes = json.loads((finished[0] / "runs/tiny-helix_2x2/metrics/rank00.json").read_text())
    held = sum(math.prod(shape) * 4 for shape, _ in shapes["parameters"].values())
    assert found[1]["weight_bytes"] == held
    shown = io.StringIO()
    experiment_now = experiment()
    Console(width=80, file=shown).print(terminal.tables(experiment_now, found)[0])
    line = next(line for line in shown.getvalue().splitlines() if "helix_2x2" in line)
    assert results.significant(held / 1e6) in line.split()


def test_of_conversations_it_says_what_losses_are_of(finished: tuple[Path, Values]) -> None:
    found, asked = finished[1]["result_collection"], experiment()
    rows = asked.batch.model_copy(update={"documents": (3, 40)})
    told = asked.model_copy(update={"sft": True, "batch": rows})
    for one, said in ((asked, False), (told, True)):
        notes = {page["title"]: page["note"] for page in counted.tables(one, found)}
        assert ("on the answers alone" in notes["Same training"]) is said
        packed = "2, of 3 to 32 tokens, 18 on average"
        assert (packed in notes["What is compared"]) is said


def test_the_outlook_predicts_the_same_layouts_beside_claims(
    finished: tuple[Path, Values],
) -> None:
    rows = outlook.rows(experiment())
    assert [(row["hardware"], row["phase"], row["layout"]) for row in rows] == [
        (machine, phase, layout)
        for machine in ("four slow ranks", "four others")
        for phase in ("train", "prefill")
        for layout in ("tp2_pp2", "helix_2x2")
    ]
    assert {row["source"] for row in rows} == {"predicted"}
    assert all(outlook.how(row) == f"mb{row['micro_batch']} spec" for row in rows)
    assert {row["phase"] for row in outlook.claimed(rows)} == {"train"}
    assert rows[1]["claimed"] == {"tokens_per_s": 123456, "tpot_ms": 0.5, "of": "another machine"}
    cells = outlook.cells(rows[1], rows)
    assert cells[1] == "123,456 (+23.5%)"
    assert cells[3] == "0.5 (-37.5%)"
    assert json.loads((finished[0] / "results.json").read_text())["outlook"] == rows
    assert outlook.rows(experiment(outlook=None)) == []


def test_experts_that_are_held_more_often_than_the_rest_are_explained() -> None:
    """What the quickstart shows of its MoE model: no pipeline, and more ranks than experts."""
    chosen = config.load(CONFIGS / "quickstart.yaml")
    (said,) = counted.experts_held(chosen)
    assert said == (
        "tiny_moe, helix_4x4: EP=8 on 16 ranks a stage, so that every expert is held 2 times and"
        " its gradients are summed over the axis data; a rank has experts of 4 layers (tp8_pp2: of"
        " 2)."
    )
    run = runs.compared(chosen)[-1]
    assert run.name == "tiny_moe-helix_4x4"
    here = expectation.deployment(chosen, run)
    sent = step_bytes(here, 0)
    of_layer = 2 * run.model.hidden_size * run.model.ffn_hidden_size * 4
    assert sent["EXPERT_DATA_PARALLEL_GROUP", "all_reduce"] == here.layers * of_layer
    assert here.replicas == 1
    assert counted.experts_held(experiment()) == []


def test_three_digits_say_what_a_figure_is() -> None:
    printed = [results.significant(value) for value in (0.0, 0.00517, 0.188, 9.876, 52.34, 39426.4)]
    assert printed == ["0", "0.00517", "0.188", "9.88", "52.3", "39,426"]


def test_a_log_gets_lines_and_no_bars() -> None:
    log = io.StringIO()
    totals = {"execution_monitoring/a": 3}
    with progress.shown(Console(file=log, width=40), totals) as (notify, advance):
        assert advance is None
        notify("input_preparation", "kept")
        notify("execution_monitoring/a", "started")
        notify("execution_monitoring/a", "done")
    assert log.getvalue().splitlines() == [
        "1 of 1, a: 3 steps, 0 s",
        "1 nodes kept",
    ]


def test_the_report_stands_alone_and_separates_claims(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in page
    assert "Verified:" in page
    assert "context switches" in page  # what times on shared cores are worth
    text = (out / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)
    order = (
        "Same training",
        "holds and sends",
        "on GPUs: predicted",
        "## Deployment",
        "## Through",
    )
    assert sorted(order, key=text.index) == list(order)
    assert "TPS, claimed | TPS, predicted | TPS, measured | prediction's error" in text
    assert "| tiny | tp2_pp2 | train | 100,000 |" in text
    assert "| tiny | helix_2x2 | train | 123,456 (+23.5%) |" in text
    assert " | 0.5 (-37.5%) | " in text
    assert "| tiny | helix_2x2 | prefill | - |" in text  # claimed is training
    assert "| tiny | tp2_pp2 | TP=2 | - | 2 | 1 | 1 | - | 4 x 2 |" in text
    assert "| tiny | helix_2x2 | m=2, n=2 | weights, batch split | 1 | 1 | 1 | - | 4 x 2 |" in text
    assert "peak memory, MB" in text
    assert "all of the experiment file small.yaml as it was read, in experiment.json (" in text
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
    plain = experiment(claims=[], hardware=None, outlook=None)
    (copy / "experiment.json").write_text(plain.model_dump_json())
    report.write(copy)
    text = (copy / "report.md").read_text()
    assert "| model | layout | phase | TPS, measured | TPOT ms, measured |" in text
    assert "laimed figures" not in text


def test_comparing_with_itself_finds_no_change(finished: tuple[Path, Values]) -> None:
    out, _ = finished
    made = comparison.table(out, out)
    assert made.row_count == 6
    assert "(4 cpu ranks, fp32)" in str(made.title)
    for row in comparison.as_json(comparison.pairs(out, out)):
        assert row["source"] == "measured"
        for figure in ("tokens_per_s", "tpot_ms", "sent_bytes", "last_loss"):
            assert row[figure][0] == row[figure][1]


TINY = DOCUMENT["models"][0]
UNEQUAL = [
    (
        {"models": [{**TINY, "ffn_hidden_size": 128, "swiglu": True}]},
        "models must be equal, got tiny.ffn_hidden_size 256, tiny.swiglu False in {0} and"
        " tiny.ffn_hidden_size 128, tiny.swiglu True in {1}; run both with the same models",
    ),
    (
        {"models": [{**TINY, "name": "other"}], "claims": [], "outlook": None},
        "models must be equal, got tiny, no other in {0} and no tiny, other in {1}; run",
    ),
    (
        {"batch": {"sequences": 16, "sequence_length": 32}},
        "batch must be equal, got sequences 8 in",
    ),
    (
        {"decode": {**DOCUMENT["decode"], "output_length": 5}},
        "decode must be equal, got output_len",
    ),
    ({"steps": 5}, "steps must be equal, got 4 in {0} and 5 in {1}; run both with the same steps"),
    ({"learning_rate": 0.5}, "learning_rate must be equal, got 0.001 in {0} and 0.5 in {1}; run"),
]


@pytest.mark.parametrize(("changed", "said"), UNEQUAL)
def test_of_unequal_experiments_what_differs_is_said(
    finished: tuple[Path, Values], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    out = tmp_path / "other"
    copied(finished[0], out)
    (out / "experiment.json").write_text(experiment(**changed).model_dump_json())
    with pytest.raises(UserError) as refused:
        comparison.pairs(finished[0], out)
    assert str(refused.value).startswith(f"compare: {said.format(finished[0], out)}")


def test_of_many_differences_some_are_said() -> None:
    others = {
        **{"num_layers": 3, "hidden_size": 65, "num_attention_heads": 5, "kv_channels": 17},
        **{"ffn_hidden_size": 257, "num_query_groups": 5, "vocab_size": 300, "swiglu": True},
        "departures": ["word " * 100],
    }
    one, other = (experiment(models=[model]).models for model in (TINY, {**TINY, **others}))
    found = comparison._differences(one, other)
    assert len(found) == len(others)
    assert max(len(text) for pair in found for text in pair) <= comparison.LONGEST


def test_unequal_or_unknown_data_are_not_compared(
    finished: tuple[Path, Values], tmp_path: Path
) -> None:
    out = tmp_path / "other"
    copied(finished[0], out)
    with pytest.raises(ValueError, match=r"other must say what it was trained on"):
        comparison.pairs(finished[0], out)
    (out / "nodes").mkdir()
    record = json.loads((finished[0] / "nodes" / "input_preparation.json").read_text())
    record["files"]["data/python_stdlib.bin"][1] = "0"
    (out / "nodes" / "input_preparation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"the data of .* must be equal, and differ"):
        comparison.pairs(finished[0], out)


def test_an_unfinished_experiment_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment\.json is missing; call `helix run"):
        results.read(tmp_path)

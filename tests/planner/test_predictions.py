"""Predictions beside every step that was measured on two GPUs, within the bars of the benchmark."""

from pathlib import Path
from statistics import fmean

import pytest

from megatron_helix.exchange.traffic import packed
from megatron_helix.machine import hardware, hopper
from megatron_helix.machine.hardware import Hardware
from megatron_helix.planner import accuracy, parameters, traffic
from megatron_helix.planner.time import predict
from tests.planner.planner_case import benchmark

BENCHMARK = benchmark()
ROWS = list(BENCHMARK.two_gpus())


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{place}-{row.cell}-{row.name}" for place, row in enumerate(ROWS)]
)
def test_what_was_measured_is_predicted(row) -> None:
    """What a result calls outside must be: a figure that holds by now is no exception."""
    assert row.missed() == set(row.outside), row.errors()


def outside(figure: str, *words: str):
    """The row of which a figure is called outside, with these words of its name."""
    rows = (row for row in ROWS if figure in row.outside)
    (found,) = (row for row in rows if all(word in f"{row.cell}, {row.name}" for word in words))
    return found


def _is_of_sums(moved) -> bool:
    return moved.when == "step" and (moved.axis, moved.kind) == ("dim", "send")


def test_a_step_as_it_was_measured_is_predicted_by_the_code_of_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason that the results give: gradients came home, summed, when nothing hid them."""
    row = outside("tpot_ms", "dense", "weights_step")
    now = traffic.transfers

    def then(*args, **known):
        return [
            moved._replace(kind="reduce_scatter", beside=None) if _is_of_sums(moved) else moved
            for moved in now(*args, **known)
        ]

    assert any(_is_of_sums(moved) and moved.beside for moved in now(row.here, 0))
    monkeypatch.setattr(traffic, "transfers", then)
    assert not row.missed()


def test_steps_as_they_were_measured_have_their_own_sums_twice() -> None:
    """The reason that the results give: a rank's own part lay beside main_grad."""
    rows = [row for row in ROWS if "own part" in row.outside.get("memory_gb", "")]
    assert len(rows) == 2
    for row in rows:
        own = parameters.layer_matrices(row.here) * row.here.layers * row.here.gradient_bytes
        then = row.predicted["memory_gb"] + own / 1e9
        assert then == pytest.approx(row.measured["memory_gb"], rel=accuracy.ERROR["memory_gb"])


def test_memory_as_it_was_measured_has_the_packed_qkv_beside_its_values() -> None:
    """The reason that the results give: views kept the whole, of which the values are a third."""
    row = outside("memory_gb", "seed, again", "prefix")
    here, model = row.here, row.here.model
    values = model.query_groups * model.kv_channels
    kept = (packed(here.cut) - values) * here.tokens / here.tp * here.element_bytes * here.layers
    then = row.predicted["memory_gb"] + kept / 1e9
    assert then == pytest.approx(row.measured["memory_gb"], rel=accuracy.ERROR["memory_gb"])


def test_a_calibrated_machine_is_predicted_with_constants_of_whole_steps() -> None:
    """Those that calibration writes without measuring them, for the same kind of card."""
    calibrated = hardware.load(Path("benchmarks/results/two_h200_calibrated.yaml"))
    default = Hardware.model_fields
    bare = {key: default[key].default for key in hopper.OF_WHOLE_STEPS}
    rows = [
        row
        for row in ROWS
        if row.machine.name == "2 x H200" and {"tokens_per_s"} & row.measured.keys() - row.outside
    ]
    assert len(rows) > 50

    def off(machine: Hardware) -> float:
        """In the mean, relative."""
        steps = [predict(row.here, machine).tokens_per_s for row in rows]
        errors = [
            step / row.measured["tokens_per_s"] - 1 for step, row in zip(steps, rows, strict=True)
        ]
        return fmean(map(abs, errors))

    assert off(calibrated) < 0.045
    assert off(calibrated.model_copy(update=bare)) > 1.5 * off(calibrated)


def test_every_layout_that_an_expert_would_pick_is_among_them() -> None:
    layouts = [row.here.layout for row in ROWS]
    assert {layout.fsdp for layout in layouts} == {None, "megatron_fsdp", "torch_fsdp2"}
    assert {layout.cp_comm_type for layout in layouts} >= {"p2p", "a2a"}
    assert any(layout.gtp > 1 for layout in layouts)
    plans = {(row.here.plan.exchange, row.here.plan.split, row.here.plan.gather) for row in ROWS}
    assert plans >= {
        ("activations", "batch", "microbatch"),
        ("weights", "batch", "microbatch"),
        ("weights", "batch", "step"),
        ("weights", "sequence", "microbatch"),
    }


def test_the_table_has_every_row() -> None:
    assert BENCHMARK.table("measured", ROWS).row_count == len(ROWS)
    assert len(list(BENCHMARK.four_gpus())) > 15

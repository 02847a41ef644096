"""Predictions beside every step that was measured on two GPUs, within the bars of the benchmark."""

import pytest

from tests.planner.planner_case import benchmark

BENCHMARK = benchmark()
ROWS = list(BENCHMARK.two_gpus())


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{place}-{row.cell}-{row.name}" for place, row in enumerate(ROWS)]
)
def test_what_was_measured_is_predicted(row) -> None:
    """What a result calls outside must be: a figure that holds by now is no exception."""
    assert row.missed() == set(row.outside), row.errors()


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

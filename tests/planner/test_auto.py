"""What ``auto`` and the planner take is no more than 3 % slower than the best they could have.

First by the times that were measured side by side on H200, then by the planner's predictions, which
:mod:`tests.planner.test_predictions` holds against the same measurements, where none were.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels import core_times
from megatron_helix.machine.hopper import of_card
from megatron_helix.options import core_attention
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import Prediction, predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from tests.planner.planner_case import MACHINES, benchmark

SLOWER = 1.03
BENCHMARK = benchmark()
Row = Any  # of the benchmark, a module that is loaded by its path

# What `auto` decides; everything else, how often weights are gathered too, is given.
DECIDED = {"name", "exchange", "split", "core_attention"}


def _ms(row: Row) -> float:
    return row.here.step_tokens / row.measured["tokens_per_s"] * 1e3


def _timed(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of steps on H200, of one cell together."""
    cells = defaultdict(list)
    for row in rows:
        # A decode step is not predicted: its host is slower than the GPU.
        timed = "tokens_per_s" in row.measured and row.here.phase != "decode"
        if timed and "H200" in row.machine.name:
            cells[row.cell].append(row)
    return cells


CELLS = _timed([*BENCHMARK.two_gpus(), *BENCHMARK.four_gpus()])


def _conditions() -> list[Any]:
    """Rows that differ in what `auto` decides alone, where there are several."""
    found = []
    for cell, rows in CELLS.items():
        alike = defaultdict(list)
        for row in rows:
            alike[row.here.layout.model_dump_json(exclude=DECIDED)].append(row)
        for group in alike.values():
            if len(group) > 1:
                found.append(pytest.param(group, id=f"{cell}-{group[0].name}"))
    return found


def _core(row: Row) -> str:
    """The core attention of a measured step."""
    asked = row.here.layout.core_attention or "spec"
    return _fastest_core(row) if asked == "auto" else asked


def _fastest_core(row: Row) -> str:
    """What ``--helix-core-attention auto`` takes there, of what needs no other package."""
    channels = row.here.model.kv_channels
    times = row.machine.core_attention or core_times.MEASURED
    able = core_attention.able(channels, on_cpu=True)
    training = row.here.phase == "train"
    size = {"channels": channels, "length": row.here.batch.sequence_length}
    return core_times.fastest(times, able, **size, training=training)[0]


@pytest.mark.parametrize("rows", _conditions())
def test_auto_takes_what_was_measured_to_be_fast(rows: list[Row]) -> None:
    """With the hardware file, and with what is known of the card where none is named."""
    core = _fastest_core(rows[0])
    here = rows[0].here
    asked = {"exchange": None, "split": None, "core_attention": core}
    layout = here.layout.model_copy(update=asked)
    for machine in (here.machine, of_card("NVIDIA H200", here.world_size)):
        plan = replace(here, layout=layout, machine=machine).check().plan
        taken = [row for row in rows if (row.here.plan, _core(row)) == (plan, core)]
        assert taken, f"{plan} with {core} was not measured there"
        assert max(map(_ms, taken)) <= SLOWER * min(map(_ms, rows))


@pytest.mark.parametrize("cell", list(CELLS))
def test_in_any_memory_the_best_prediction_was_measured_to_be_fast(cell: str) -> None:
    """Of those that fit: how often weights are gathered, micro-batches, cuts.

    And on two GPUs, for which the bars of predictions are, of rivals as well.
    """
    helix = [row for row in CELLS[cell] if row.here.layout.is_helix]
    together = [helix, CELLS[cell]] if CELLS[cell][0].here.world_size == 2 else [helix]
    for rows in together:
        for limit in {row.measured.get("memory_gb", 0.0) for row in rows}:
            fit = [row for row in rows if row.measured.get("memory_gb", 0.0) <= limit]
            taken = max(fit, key=lambda row: row.predicted["tokens_per_s"])
            best = min(fit, key=_ms)
            assert _ms(taken) <= SLOWER * _ms(best), f"{taken.name} for {best.name} in {limit} GB"


def test_plans_were_measured_side_by_side() -> None:
    """Of every kind, or the tests above say nothing of it."""
    plans = {(row.here.plan.gather, _core(row)) for rows in CELLS.values() for row in rows}
    assert plans >= {(gather, "spec") for gather in ("microbatch", "once", "step")}
    assert ("microbatch", "prefix") in plans
    assert len(_conditions()) >= 3


def _predictions(here: Deployment) -> Iterator[Prediction]:
    """Of every exchange and split that can run, as far as they fit."""
    for exchange, split in product(("activations", "weights"), ("batch", "sequence")):
        layout = here.layout.model_copy(update={"exchange": exchange, "split": split})
        assert here.machine
        try:
            found = predict(replace(here, layout=layout).check(), here.machine)
        except UserError:
            continue
        if found.memory.total <= here.machine.memory.rate:
            yield found


@pytest.mark.parametrize("machine", ["h200_2", "h200_4", "h200_8"])
@pytest.mark.parametrize("phase", ["train", "forward"])
def test_auto_takes_what_the_planner_predicts_to_be_fast(machine: str, phase: str) -> None:
    """The models that were measured against rivals, in other lengths, micro-batches and cuts."""
    here, compared = MACHINES[machine], 0
    models = {row.here.model.name: row.here.model for row in BENCHMARK.two_gpus()}
    cases = product(("dense", "qwen", "long"), (512, 4096, 32768), (1, 2), (1, 4, 16))
    for model, length, n, size in cases:
        if n == here.devices:
            continue
        batch = BatchConfig(sequences=2 * size, sequence_length=length)
        cut = {"m": here.devices // n, "n": n, "micro_batch": size}
        layout = LayoutConfig(name="auto", **cut)
        auto = Deployment(models[model], layout, batch, here.devices, phase, "bf16", here)
        found = list(_predictions(auto))
        if len(found) < 2:
            continue
        compared += 1
        taken = predict(auto.check(), here)
        best = min(found, key=lambda one: one.step_s)
        plans = f"{auto.plan} for {best.deployment.plan}: {model}, {length}, {cut}"
        assert taken.step_s <= SLOWER * best.step_s, plans
    assert compared > 20

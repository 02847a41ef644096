"""What gradients and their optimizer are predicted to hold and to move."""

from dataclasses import replace

import pytest

from megatron_helix.planner import memory, parameters, update
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.precision import Precision
from tests.planner.planner_case import DENSE


@pytest.mark.parametrize(
    ("precision", "every", "step"), [("fp16", 6, 62), ("bf16", 10, 50), ("fp32", 12, 44)]
)
def test_what_training_moves_of_a_parameter(precision: Precision, every: int, step: int) -> None:
    """By Megatron's passes, on one rank: of a micro-batch's gradients, and of the optimizer."""
    layout = LayoutConfig(name="one", tp=1, micro_batch=1)
    batch = BatchConfig(sequences=4, sequence_length=64)
    here = Deployment(DENSE, layout, batch, 1, precision=precision).check()
    held = sum(parameters.held(here, 0))
    assert update.accumulation_bytes(here, 0) == every * held
    assert update.optimizer_bytes(here, 0) == step * held
    # Replicas average, and share out what the optimizer does.
    shared = LayoutConfig(name="two", tp=1, micro_batch=1, distributed_optimizer=True)
    two = Deployment(DENSE, shared, batch, 2, precision=precision).check()
    width = here.gradient_bytes
    assert update.optimizer_bytes(two, 0) == held * (3 * width + (step - width) / 2)


@pytest.mark.parametrize(("precision", "width", "sums"), [("fp16", 2, 4), ("bf16", 2, 8)])
def test_what_gradients_of_gathered_weights_move(
    precision: Precision, width: int, sums: int
) -> None:
    """Parts of other ranks are read; those of a step are added up by their GEMM, whole."""
    batch = BatchConfig(sequences=8, sequence_length=64)

    def moved(gather: str, **more: int) -> float:
        keys = {"m": 4, "n": 1, "exchange": "weights", "gather": gather, "micro_batch": 4, **more}
        layout = LayoutConfig.model_validate({"name": gather, **keys})
        here = Deployment(DENSE, layout, batch, 4, precision=precision).check()
        matrices = parameters.layer_matrices(here) * here.layers
        rest = sum(parameters.held(here, 0)) - matrices
        return (update.accumulation_bytes(here, 0) - rest * (width + sums)) / matrices

    assert moved("microbatch") == moved("once") == 4 * width + sums
    assert moved("step") == 4 * sums
    part = 1 / DENSE.num_layers
    some = moved("step", gather_layers=1)
    assert some == pytest.approx(part * moved("step") + (1 - part) * moved("once"))


@pytest.mark.parametrize("gather", ["microbatch", "step"])
def test_gradients_in_bf16_are_half_as_wide(gather: str) -> None:
    """Sums of a step are of the m shards of every weight; the optimizer widens its share."""
    keys = {"m": 4, "n": 1, "exchange": "weights", "gather": gather, "micro_batch": 4}
    layout = LayoutConfig.model_validate({"name": gather, **keys})
    batch = BatchConfig(sequences=8, sequence_length=64)
    wide = Deployment(DENSE, layout, batch, 4, precision="bf16").check()
    narrow = replace(wide, gradient_flags=GradientFlags(grad_reduce_in_bf16=True))
    before, after = (memory.of_rank(here, 0, fused_channels=256) for here in (wide, narrow))
    held = sum(parameters.held(wide, 0))
    assert before.gradients - after.gradients == 2 * held
    # What a micro-batch adds to: read and written.
    sums = held
    if gather == "step":
        sums += 3 * parameters.layer_matrices(wide) * wide.layers
    saved = update.accumulation_bytes(wide, 0) - update.accumulation_bytes(narrow, 0)
    assert saved == 2 * 2 * sums
    # Zeroed by g, and g + 4 to widen them.
    ended = update.optimizer_bytes(narrow, 0) - update.optimizer_bytes(wide, 0)
    assert ended == (-2 + 2 + 4) * held

"""What a layout is expected to send, before anything runs."""

from typing import Any

from megatron_helix.experiment.runs import Run
from megatron_helix.verification import expectation
from tests.experiment_case import DOCUMENT, experiment

WEIGHTS = DOCUMENT["layouts"][1]


def forward_bytes(**keys: Any) -> dict[Any, float]:
    """Of rank 0 of the cut 2 x 2, in a forward pass alone."""
    chosen = experiment(layouts=[{**WEIGHTS, **keys}], claims=[])
    run = Run(model=chosen.models[0], layout=chosen.layouts[0], phase="prefill", precision="fp32")
    return expectation.predicted_bytes(chosen, run, 0)


def test_a_forward_pass_alone_gathers_in_every_micro_batch_whatever_a_step_keeps() -> None:
    every = forward_bytes()
    gathered = sum(sent for (axis, _), sent in every.items() if axis.startswith("HELIX_DIM"))
    assert gathered > 0
    assert forward_bytes(gather="once") == every
    assert forward_bytes(gather="step") == every

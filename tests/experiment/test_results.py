"""The verdict on results."""

import math

import pytest

from megatron_helix.experiment import results
from tests.experiment_case import experiment


def test_a_difference_is_the_largest_of_all_steps() -> None:
    assert results.largest_difference([4.0, 3.0, 2.0], [4.0, 4.0, 2.0]) == 0.25
    assert results.largest_difference([], []) == 0


@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_is_no_number_at_any_step_is_not_exact(step: int) -> None:
    chosen = experiment()
    good = [4.0, 3.0, 2.0]
    bad = [*good[:step], math.nan, *good[step + 1 :]]
    found = [
        {"name": name, "model": "tiny", "layout": layout.name, "phase": "train"}
        | {"precision": "fp32", "losses": losses, "grad_norms": good}
        for layout, name, losses in zip(
            chosen.layouts, ("stock", "helix"), (good, bad), strict=True
        )
    ]
    said = results.departures(chosen, found)
    assert len(said) == 1
    assert said[0].startswith("helix: losses leave stock's by nan")

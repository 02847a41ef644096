"""What is said beside predictions of runs that were slow for a reason that none has."""

import pytest

from megatron_helix.report import prediction


def result(computed_ms: float | None, compute: float = 40.0) -> dict[str, object]:
    """Of a run, the part that matters."""
    return {"computed_ms": computed_ms, "breakdown_ms": {"compute": compute}}


@pytest.mark.parametrize(
    ("computed", "said"),
    [
        ([39.0, 21.0, None], ""),  # the last on CPUs
        ([39.0, 8.0], "GPUs ran kernels 20 % of the time, in 1 of 2 runs"),
        ([4.0, 39.0, 8.0], "GPUs ran kernels 10 to 20 % of the time, in 2 of 3 runs"),
    ],
)
def test_hosts_that_start_kernels_too_late_are_named(
    computed: list[float | None], said: str
) -> None:
    found = prediction.of_late_hosts([result(one) for one in computed])
    assert said in found
    assert bool(found) is bool(said)


def test_a_run_stored_before_kernels_were_summed_says_nothing() -> None:
    assert prediction.of_late_hosts([{"breakdown_ms": {"compute": 40.0}}]) == ""

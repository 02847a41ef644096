"""What the planner says of a run, to stand beside what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run
from megatron_helix.planner.time import predict
from megatron_helix.verification import expectation


def of_run(experiment: ExperimentConfig, run: Run) -> dict[str, Any] | None:
    """TPS and TPOT of a run on the experiment's hardware; None without hardware."""
    if experiment.hardware is None:
        return None
    machine = experiment.hardware.scaled(experiment.world_size)
    phase = "forward" if run.phase == "prefill" else run.phase
    here = replace(expectation.deployment(experiment, run), phase=phase).check()
    found = predict(here, machine)
    return {
        "tokens_per_s": found.tokens_per_s,
        "tpot_ms": found.tpot_ms,
        "source": "predicted",
        "hardware": machine.name,
    }


def error(result: dict[str, Any], key: str) -> float:
    """How far the prediction of a figure is off, relative to the measurement."""
    return result["predicted"][key] / result[key] - 1 if result[key] else 0.0


def of_late_hosts(results: Sequence[dict[str, Any]]) -> str:
    """What is said where GPUs idled outside collectives for most of the time; else nothing.

    Small kernels end before a process has started the next ones.
    """
    shares = [
        result["computed_ms"] / computing
        for result in results
        if result.get("computed_ms") and (computing := result["breakdown_ms"]["compute"])
    ]
    late = sorted(round(100 * share) for share in shares if share < 0.5)
    if not late:
        return ""
    said = f"{late[0]}" if late[0] == late[-1] else f"{late[0]} to {late[-1]}"
    return (
        f" Outside collectives GPUs ran kernels {said} % of the time, in {len(late)} of"
        f" {len(results)} runs: to start them took longer. Of that what a hardware file says of"
        " layers (host) is predicted; embedding, head, data and optimizer are not."
    )

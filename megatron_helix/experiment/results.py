"""Results as a finished experiment left them, and the verdict on them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import read_record

Result = dict[str, Any]


def read(out: Path) -> dict[str, Any]:
    """What a finished experiment left in its folder.

    Returns:
        ``experiment``, ``results``, ``verification``, ``data`` (its files) and ``cuts`` (the
        partition of every run).

    Raises:
        ValueError: when something is missing.
    """
    for name in ("experiment.json", "results.json", "verification.json"):
        if not (out / name).exists():
            raise ValueError(
                f"{out}: must hold a finished experiment, and {name} is missing; call"
                f" `helix run EXPERIMENT --out {out}` first"
            )
    experiment = ExperimentConfig.model_validate_json((out / "experiment.json").read_text())
    record = read_record(out, "input_preparation")
    results = json.loads((out / "results.json").read_text())["runs"]
    cuts = {
        run["name"]: (read_record(out, f"partitioning_setup/{run['name']}") or {}).get("value")
        for run in results
    }
    return {
        "experiment": experiment,
        "results": results,
        "verification": json.loads((out / "verification.json").read_text())["checks"],
        "data": (record or {}).get("files", {}),
        "cuts": cuts,
    }


def baseline_of(result: Result, results: Sequence[Result]) -> Result:
    """The first layout of the same model and phase."""
    return next(
        other
        for other in results
        if (other["model"], other["phase"]) == (result["model"], result["phase"])
    )


def trained(results: Sequence[Result]) -> list[Result]:
    """Those of Megatron's loop, which have losses: training and prefill."""
    return [result for result in results if result["phase"] != "decode"]


def decoded(results: Sequence[Result]) -> list[Result]:
    """Those of the decode phase."""
    return [result for result in results if result["phase"] == "decode"]


def largest_difference(values: list[float], baseline: list[float]) -> float:
    """Largest relative difference to the baseline over all steps; 0 where there is no value."""
    pairs = zip(values, baseline, strict=True)
    return max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)


def departures(experiment: ExperimentConfig, results: list[Result]) -> list[str]:
    """What leaves the baseline by more than the tolerance; nothing when the layouts are exact."""
    found = []
    for result in trained(results):
        baseline = baseline_of(result, results)
        for key, allowed in (
            ("losses", experiment.tolerance.loss),
            ("grad_norms", experiment.tolerance.grad_norm),
        ):
            difference = largest_difference(result[key], baseline[key])
            if not difference <= allowed:  # also where it is not a number
                found.append(
                    f"{result['name']}: {key} leave {baseline['name']}'s by {difference:.1e}"
                    f" (relative), allowed {allowed:.0e}"
                )
    return found


def failures(checks: Sequence[dict[str, Any]]) -> list[str]:
    """The checks of the deployment verification that did not pass."""
    return [
        f"{check['check']}, {check['run']}: {check['detail']}"
        for check in checks
        if check["passed"] is False
    ]


def verdict(experiment: ExperimentConfig, results: list[Result], checks: Sequence[Any]) -> str:
    """One sentence on an experiment in which nothing is wrong."""
    others = [result for result in trained(results) if result is not baseline_of(result, results)]
    furthest = max(
        (
            largest_difference(result["losses"], baseline_of(result, results)["losses"])
            for result in others
        ),
        default=None,
    )
    passed = sum(check["passed"] is True for check in checks)
    asked = f"{passed} checks of the deployment pass"
    if furthest is None:
        return asked
    return (
        f"{asked}; no layout's loss leaves the first one's by more than {furthest:.1e}"
        f" (allowed {experiment.tolerance.loss:.0e})"
    )


def significant(value: float) -> str:
    """Three significant digits, and all that stand before the point."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def change(value: float, baseline: float, digits: int = 1) -> str:
    """What is printed behind a value: by how much it differs, relative."""
    return "" if value == baseline or not baseline else f" ({value / baseline - 1:+.{digits}%})"

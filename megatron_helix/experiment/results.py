"""Results as a finished experiment left them, and the verdict on them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import read_record
from megatron_helix.planner.book import AXES
from megatron_helix.run_config.files import validated

Result = dict[str, Any]

_OF_RUNS = {"name", "model", "layout", "phase", "tokens_per_s", "tpot_ms", "sent_bytes", "commit"}
# The ledger's axes, as a reader knows them; what is rare, or over all ranks, is one.
AXIS_NAMES = {
    AXES["dim"]: "dim",
    AXES["head"]: "head",
    AXES["tp"]: "tensor",
    AXES["cp"]: "context",
    AXES["pp"]: "pipeline",
    AXES["gtp"]: "weight shards",
    AXES["ep"]: "experts",
    AXES["etp"]: "experts",
    AXES["etp_ep"]: "experts",
    AXES["dp"]: "data",
    AXES["expert_dp"]: "data",
    "": "other",
}
AXES_SHOWN = tuple(dict.fromkeys(AXIS_NAMES.values()))
_OF_CHECKS = {"check", "run", "passed", "detail"}


def read(out: Path) -> dict[str, Any]:
    """What a finished experiment left in its folder.

    Returns:
        ``experiment``, ``file`` (its name, None where nobody said it), ``results``,
        ``verification``, ``data`` (its files) and ``cuts`` (the partition of every run).

    Raises:
        UserError: when something is missing, or was torn or edited.
    """
    call = f"call `helix run EXPERIMENT --out {out}`"
    for name in ("experiment.json", "results.json", "verification.json"):
        if not (out / name).exists():
            raise UserError(
                f"{out}: must hold a finished experiment, and {name} is missing; {call} first"
            )
    again = f"{call} once more, which writes it again"
    found = {
        "experiment": _experiment(out / "experiment.json", again),
        "results": _items(out / "results.json", "runs", _OF_RUNS, again),
        "verification": _items(out / "verification.json", "checks", _OF_CHECKS, again),
    }
    record = read_record(out, "input_preparation")
    cuts = {
        run["name"]: (read_record(out, f"partitioning_setup/{run['name']}") or {}).get("value")
        for run in found["results"]
    }
    found["file"] = files.read_json(out / "results.json", again).get("file")
    return {**found, "data": (record or {}).get("files", {}), "cuts": cuts}


def _experiment(path: Path, remedy: str) -> ExperimentConfig:
    try:
        return validated(ExperimentConfig, files.read_json(path, remedy), path)
    except UserError as error:
        first = str(error).splitlines()[0].removesuffix(f"; {remedy}")
        raise UserError(f"{first}; {remedy}") from None


def _items(path: Path, key: str, needed: set[str], remedy: str) -> list[dict[str, Any]]:
    """The mappings that a file lists under a key, each with what it needs."""
    document = files.read_json(path, remedy)
    items = document.get(key) if isinstance(document, dict) else None
    if isinstance(items, list) and all(
        isinstance(item, dict) and needed <= item.keys() for item in items
    ):
        return items
    raise UserError(
        f"{path}: must list {key}, each with {', '.join(sorted(needed))}, and was edited; {remedy}"
    )


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


def by_axis(result: Result) -> dict[str, float]:
    """Bytes that a rank sent in a step, by :data:`AXIS_NAMES`; axes that sent none are left out."""
    sums: dict[str, float] = {}
    for key, sent in result["sent_bytes"].items():
        if sent:
            name = AXIS_NAMES.get(key.split("/")[0], AXIS_NAMES[""])
            sums[name] = sums.get(name, 0.0) + sent
    return sums


def largest_difference(values: list[float], baseline: list[float]) -> float:
    """Largest relative difference to the baseline over all steps; 0 where there is no value.

    Not a number where one of them is none, at whatever step: ``max`` would pass over it.
    """
    apart = [abs(a - b) / abs(b) for a, b in zip(values, baseline, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=0.0)


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


def if_known(value: float | None, digits: int | None = None) -> str:
    """The same, or so many digits behind the point; a stroke where there is no figure."""
    if value is None:
        return "-"
    return significant(value) if digits is None else f"{value:,.{digits}f}"


def change(value: float, baseline: float, digits: int = 1) -> str:
    """What is printed behind a value: by how much it differs, relative."""
    return "" if value == baseline or not baseline else f" ({value / baseline - 1:+.{digits}%})"

"""Results side by side: the table a user reads, the file a program reads, and the verdict."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from megatron_helix.experiment.config import ExperimentConfig

_CPU_NOTE = (
    " The ranks share this machine's cores: TPS and TPOT count context switches here, not a link."
    " Bytes and losses are what they are on GPUs."
)


def largest_difference(values: list[float], baseline: list[float]) -> float:
    """Largest relative difference to the baseline over all steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, baseline, strict=True))


def departures(experiment: ExperimentConfig, results: list[dict[str, Any]]) -> list[str]:
    """What leaves the baseline by more than the tolerance; nothing when the layouts are exact."""
    found = []
    for result in results:
        baseline = _baseline(result, results)
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


def table(results: list[dict[str, Any]]) -> Table:
    """One line a run. All figures are measured, on the device the title names."""
    first = results[0]
    made = Table(
        title=f"Training, measured on {first['world_size']} {first['device']} ranks",
        caption="TPS: tokens a second. TPOT: communication and waiting time of a rank, mean over"
        " ranks, for as many tokens as the batch has sequences. MB: sent by a rank in a step."
        " Diff.: of the loss to the baseline's, relative, largest of all steps."
        + (_CPU_NOTE if first["device"] == "cpu" else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("model", "layout"):
        made.add_column(heading, no_wrap=True)
    for heading in ("TPS", "TPOT\nms", "MB", "first\nloss", "last\nloss", "diff."):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = _baseline(result, results)
        difference = largest_difference(result["losses"], baseline["losses"])
        made.add_row(
            result["model"],
            result["layout"],
            f"{result['tokens_per_s']:,.0f}",
            f"{result['tpot_ms']:,.1f}",
            f"{sum(result['sent_bytes'].values()) / 1e6:.2f}",
            f"{result['losses'][0]:.4f}",
            f"{result['losses'][-1]:.4f}",
            "baseline" if result is baseline else f"{difference:.1e}",
            end_section=result is results[-1] or _next(result, results)["model"] != result["model"],
        )
    return made


def write(results: list[dict[str, Any]], path: Path) -> None:
    """``results.json``: the runs, the baseline first within a model."""
    path.write_text(json.dumps({"runs": results}, indent=2) + "\n")


def _baseline(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return next(other for other in results if other["model"] == result["model"])


def _next(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return results[results.index(result) + 1]

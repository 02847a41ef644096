"""Results side by side: what a user reads (table, Markdown, HTML, plots) and the verdict.

Figures are measured, predicted or claimed; each table says which in its heading, and none stands in
another's column.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import read_record
from megatron_helix.planner.flops import FORMULA

Result = dict[str, Any]

CPU_NOTE = (
    "The ranks share this machine's cores: TPS and TPOT count context switches here, not a link."
    " Bytes and losses are what they are on GPUs."
)


def largest_difference(values: list[float], baseline: list[float]) -> float:
    """Largest relative difference to the baseline over all steps; 0 where there is no value."""
    pairs = zip(values, baseline, strict=True)
    return max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)


def departures(experiment: ExperimentConfig, results: list[Result]) -> list[str]:
    """What leaves the baseline by more than the tolerance; nothing when the layouts are exact."""
    found = []
    for result in results:
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


def table(results: list[Result]) -> Table:
    """One line a run. All figures are measured, on the device the title names."""
    first = results[0]
    made = Table(
        title=f"Measured on {first['world_size']} {first['device']} ranks",
        caption="TPS: tokens a second. TPOT: communication and waiting time of a rank, mean over"
        " ranks, for as many tokens as the batch has sequences. MB: sent by a rank in a step."
        " Diff.: of the loss to the baseline's, relative, largest of all steps."
        + (f" {CPU_NOTE}" if first["device"] == "cpu" else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("model", "layout"):
        made.add_column(heading, no_wrap=True)
    for heading in ("TPS", "TPOT\nms", "MB", "first\nloss", "last\nloss", "diff."):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = baseline_of(result, results)
        difference = largest_difference(result["losses"], baseline["losses"])
        made.add_row(
            result["model"] + (" prefill" if result["phase"] == "prefill" else ""),
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


def baseline_of(result: Result, results: Sequence[Result]) -> Result:
    """The first layout of the same model and phase."""
    return next(
        other
        for other in results
        if (other["model"], other["phase"]) == (result["model"], result["phase"])
    )


def _next(result: Result, results: list[Result]) -> Result:
    return results[results.index(result) + 1]


def read(out: Path) -> dict[str, Any]:
    """What a finished experiment left in its folder.

    Returns:
        ``experiment``, ``results``, ``verification``, ``data`` and ``nodes``.

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


def write(out: Path) -> list[Path]:
    """``report.md``, a self-contained ``report.html`` and the plots, from what is in ``out``.

    Returns:
        The files.
    """
    from megatron_helix.experiment import plots

    found = read(out)
    pictures = plots.draw(found, out / "plots")
    content = _content(found)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_helix.experiment"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
    )
    embedded = [
        {
            "title": title,
            "path": path.relative_to(out),
            "base64": base64.b64encode(path.read_bytes()).decode(),
        }
        for title, path in pictures
    ]
    written = []
    for name in ("report.md", "report.html"):
        page = environment.get_template(f"{name}.j2").render(**content, pictures=embedded)
        (out / name).write_text(page)
        written.append(out / name)
    return [*written, *(path for _, path in pictures)]


def _content(found: dict[str, Any]) -> dict[str, Any]:
    """What the templates print: headings and cells, formatted."""
    experiment: ExperimentConfig = found["experiment"]
    results: list[Result] = found["results"]
    wrong = departures(experiment, results) + failures(found["verification"])
    return {
        "experiment": experiment,
        "device": f"{experiment.world_size} {experiment.device} ranks",
        "commits": sorted({result["commit"] for result in results}),
        "cpu_note": CPU_NOTE if experiment.device == "cpu" else "",
        "wrong": wrong,
        "formula": FORMULA,
        "tables": [
            _source_table(experiment, results),
            _exactness_table(results),
            _time_table(results),
            _bytes_table(results, found["cuts"]),
        ],
        "checks": [
            {**check, "verdict": {True: "pass", False: "FAIL", None: "-"}[check["passed"]]}
            for check in found["verification"]
        ],
    }


def _change(value: float, baseline: float) -> str:
    return "" if value == baseline else f" ({value / baseline - 1:+.1%})"


def _source_table(experiment: ExperimentConfig, results: list[Result]) -> dict[str, Any]:
    """TPS and TPOT of every run, and beside them what the experiment file says is claimed."""
    claims = {(claim.model, claim.layout): claim for claim in experiment.claims}
    heads = ["model", "layout", "phase"]
    for figure in ("TPS", "TPOT ms"):
        heads += [f"{figure}, claimed"] if claims else []
        heads.append(f"{figure}, measured")
    rows = []
    for result in results:
        base = baseline_of(result, results)
        claimed = claims.get((result["model"], result["layout"]))
        row = [result["model"], result["layout"], result["phase"]]
        for key, digits in (("tokens_per_s", 0), ("tpot_ms", 2)):
            if claims:
                row.append(f"{getattr(claimed, key):,.{digits}f}" if claimed else "-")
            row.append(f"{result[key]:,.{digits}f}{_change(result[key], base[key])}")
        rows.append(row)
    note = "In brackets: against the first layout."
    if claims:
        of = "; ".join(sorted({claim.of for claim in experiment.claims}))
        note = f"Claimed figures are those of {of}. {note}"
    return {"title": "Throughput and overhead", "note": note, "heads": heads, "rows": rows}


def _exactness_table(results: list[Result]) -> dict[str, Any]:
    rows = []
    for result in results:
        base = baseline_of(result, results)
        norms = largest_difference(result["grad_norms"], base["grad_norms"])
        rows.append(
            [
                result["name"],
                f"{result['losses'][0]:.6f}",
                f"{result['losses'][-1]:.6f}",
                *(
                    ["baseline", "baseline"]
                    if result is base
                    else [
                        f"{largest_difference(result['losses'], base['losses']):.1e}",
                        f"{norms:.1e}" if result["grad_norms"] else "-",
                    ]
                ),
            ]
        )
    return {
        "title": "Same training",
        "note": "Measured. Largest relative difference to the first layout over all steps.",
        "heads": ["run", "first loss", "last loss", "loss differs by", "gradient norm differs by"],
        "rows": rows,
    }


def _time_table(results: list[Result]) -> dict[str, Any]:
    rows = []
    for result in results:
        low, high = result["step_ms_spread"]
        parts = result["breakdown_ms"]
        rows.append(
            [
                result["name"],
                f"{result['step_ms']:,.1f} ({low:,.1f} to {high:,.1f})",
                *(f"{parts[part]:,.1f}" for part in parts),
                f"{result['tpot_mean_ms']:.2f} / {result['tpot_ms']:.2f} /"
                f" {result['tpot_p99_ms']:.2f} / {result['tpot_slowest_rank_ms']:.2f}",
                f"{result['tokens_per_s'] / result['world_size']:,.0f}",
                f"{result['tflops_per_device']:.3g}",
                "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
            ]
        )
    return {
        "title": "Where a step's time goes",
        "note": "Measured, ms. Step: slowest rank, median (shortest to longest). Parts: means over"
        " ranks and steps.",
        "heads": [
            *("run", "step", "compute", "communication", "waiting", "pipeline idle"),
            *("TPOT mean / p50 / p99 / slowest rank", "tokens/s/device", "TFLOP/s/device", "MFU"),
        ],
        "rows": rows,
    }


def _bytes_table(results: list[Result], cuts: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for result in results:
        ranks = cuts[result["name"]]["ranks"] if cuts[result["name"]] else []
        predicted: dict[str, float] = {}
        for rank in ranks:
            for key, value in rank["predicted_bytes"].items():
                predicted[key] = predicted.get(key, 0) + value / len(ranks)
        for key in sorted({*predicted, *result["sent_bytes"]}):
            want, got = predicted.get(key, 0), result["sent_bytes"].get(key, 0)
            if want or got:
                axis, kind = key.split("/")
                axis = axis.removesuffix("_GROUP").replace("_", " ").lower()
                cells = [result["name"], axis, kind.replace("_", " ")]
                rows.append([*cells, f"{want:,.0f}", f"{got:,.0f}"])
    return {
        "title": "Bytes a rank sends in a step",
        "note": "Mean over ranks.",
        "heads": ["run", "axis", "collective", "predicted", "measured"],
        "rows": rows,
    }


def compare(first: Path, second: Path) -> Table:
    """Two experiments side by side.

    Raises:
        ValueError: when models, data, batch, steps or learning rate are not the same.
    """
    a, b = read(first), read(second)
    for what in ("models", "batch", "steps", "learning_rate"):
        one, other = getattr(a["experiment"], what), getattr(b["experiment"], what)
        if one != other:
            raise ValueError(
                f"compare: {what} must be equal, got {_shown(one)} in {first} and {_shown(other)}"
                f" in {second}; run both with the same {what}"
            )
    if [*a["data"].values()] != [*b["data"].values()]:
        raise ValueError(f"compare: the data of {first} and {second} must be equal, and differ")
    made = Table(title=f"{second} against {first}, measured", box=box.SIMPLE_HEAD)
    for heading in ("run", "TPS", "TPOT ms", "MB sent", "last loss"):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    others = {result["name"]: result for result in b["results"]}
    shared = [result for result in a["results"] if result["name"] in others]
    if not shared:
        raise ValueError(f"compare: {first} and {second} have no run of the same name")
    for one in shared:
        other = others[one["name"]]
        cells = []
        for key, digits in (("tokens_per_s", 0), ("tpot_ms", 2)):
            cells.append(f"{other[key]:,.{digits}f}{_change(other[key], one[key])}")
        sent = [sum(result["sent_bytes"].values()) / 1e6 for result in (one, other)]
        cells.append(f"{sent[1]:.2f}{_change(sent[1], sent[0])}")
        cells.append(f"{other['losses'][-1]:.6f} ({other['losses'][-1] - one['losses'][-1]:+.1e})")
        made.add_row(one["name"], *cells)
    return made


def _shown(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return ", ".join(str(item) for item in items)

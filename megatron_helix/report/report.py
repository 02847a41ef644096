"""What a user reads of a finished experiment: Markdown, HTML and plots."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from megatron_helix.basics import files
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import digest
from megatron_helix.experiment.results import Result, departures, failures, read, verdict
from megatron_helix.planner.flops import FORMULA
from megatron_helix.report import tables
from megatron_helix.report.terminal import CPU_NOTE


def write(out: Path) -> list[Path]:
    """``report.md``, a self-contained ``report.html`` and the plots, from what is in ``out``.

    Returns:
        The files.
    """
    from megatron_helix.report import plots

    found = read(out)
    pictures = plots.draw(found, out / "plots")
    content = _content(found)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_helix.report"),
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
        files.write(out / name, page)
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
        "configuration": f"experiment.json ({digest(experiment.model_dump(mode='json'))})",
        "verdict": verdict(experiment, results, found["verification"]),
        "cpu_note": CPU_NOTE if experiment.device == "cpu" else "",
        "wrong": wrong,
        "formula": FORMULA,
        "tables": tables.of_report(experiment, results),
        "bytes": tables.of_bytes(results, found["cuts"]),
        "checks": [
            {**check, "verdict": {True: "pass", False: "FAIL", None: "-"}[check["passed"]]}
            for check in found["verification"]
        ],
    }

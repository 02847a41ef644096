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
from megatron_helix.report import counted, plots, timed
from megatron_helix.report.terminal import CPU_NOTE


def write(out: Path) -> list[Path]:
    """``report.md``, a self-contained ``report.html`` and the plots, from what is in ``out``.

    Returns:
        The files.
    """
    found = read(out)
    content = _content(found, plots.draw(found, out / "plots"), out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_helix.report"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
    )
    written = []
    for name in ("report.md", "report.html"):
        page = environment.get_template(f"{name}.j2").render(**content)
        files.write(out / name, page)
        written.append(out / name)
    return [*written, *sorted((out / "plots").glob("*.png"))]


def _content(found: dict[str, Any], pictures: list[plots.Picture], out: Path) -> dict[str, Any]:
    """What the templates print: headings and cells, formatted; what the device can show first."""
    experiment: ExperimentConfig = found["experiment"]
    results: list[Result] = found["results"]
    of_counts, of_clocks = (
        [
            *room.tables(experiment, results),
            *(_embedded(picture, out) for picture in pictures if picture.is_timed is is_timed),
        ]
        for room, is_timed in ((counted, False), (timed, True))
    )
    on_cpu = experiment.device == "cpu"
    named = f" {found['file']}" if found["file"] else ""
    wrong = departures(experiment, results) + failures(found["verification"])
    return {
        "experiment": experiment,
        "device": f"{experiment.world_size} {experiment.device} ranks",
        "commits": sorted({result["commit"] for result in results}),
        "configuration": f"all of the experiment file{named} as it was read, in experiment.json"
        f" ({digest(experiment.model_dump(mode='json'))})",
        "verdict": verdict(experiment, results, found["verification"]),
        "cpu_note": CPU_NOTE if on_cpu else "",
        "wrong": wrong,
        "formula": FORMULA,
        "first": of_counts if on_cpu else of_clocks,
        "last": of_clocks if on_cpu else of_counts,
        "bytes": counted.bytes_sent(results, found["cuts"]),
        "checks": [
            {**check, "verdict": {True: "pass", False: "FAIL", None: "-"}[check["passed"]]}
            for check in found["verification"]
        ],
    }


def _embedded(picture: plots.Picture, out: Path) -> dict[str, Any]:
    return {
        "title": picture.title,
        "path": picture.path.relative_to(out),
        "base64": base64.b64encode(picture.path.read_bytes()).decode(),
    }

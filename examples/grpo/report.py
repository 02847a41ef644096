"""Curves of one or more runs, side by side: ``python examples/grpo/report.py OUT RUN...``."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl

mpl.use("Agg")  # a machine without a display
from matplotlib import pyplot as plt

TURNS = "turns.jsonl"
CURVES = {"reward": "mean reward of a turn", "length": "mean tokens of an answer"}


def read(run: Path) -> list[dict[str, Any]]:
    """The turns of a run."""
    return [json.loads(line) for line in (run / TURNS).read_text().splitlines()]


def write(out: Path, runs: Sequence[Path]) -> Path:
    """``report.md`` and ``curves.svg`` in the folder ``out``; the page's path."""
    turns = {run.name: read(run) for run in runs}
    figure = curves(turns)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "curves.svg")
    plt.close(figure)
    template = jinja2.Template(
        Path(__file__).with_name("report.md.j2").read_text(), trim_blocks=True
    )
    page = out / "report.md"
    page.write_text(template.render(runs=[_row(name, lines) for name, lines in turns.items()]))
    return page


def curves(turns: dict[str, list[dict[str, Any]]]) -> Any:
    """A panel for each of :data:`CURVES`, a curve for each run."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(9, 3.2), layout="constrained")
    for place, (key, label) in zip(axes, CURVES.items(), strict=True):
        for name, lines in turns.items():
            place.plot([one["turn"] for one in lines], [one[key] for one in lines], label=name)
        place.set(xlabel="turn", ylabel=label)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


def _row(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the first and the last five turns, and the median time of one."""
    first, last = (
        statistics.mean(one["reward"] for one in part) for part in (lines[:5], lines[-5:])
    )
    return {
        "name": name,
        "turns": len(lines),
        "first": f"{first:.3f}",
        "last": f"{last:.3f}",
        "length": f"{statistics.mean(one['length'] for one in lines[-5:]):.2f}",
        **{
            key: f"{statistics.median(one[key] for one in lines):.2f}"
            for key in ("rollout_s", "update_s")
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="Folder of the page and its picture.")
    parser.add_argument("runs", type=Path, nargs="+", help="Folders that grpo.py has written.")
    asked = parser.parse_args()
    print(write(asked.out, asked.runs))

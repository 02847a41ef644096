"""The report's pictures, as PNG files. Colours are told apart without seeing red or green."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.metrics import PARTS
from megatron_helix.experiment.results import AXES_SHOWN, by_axis, decoded, significant, trained
from megatron_helix.report import load_map, outlook

_COLOURS = (  # of Okabe and Ito, and a grey
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442"),
    "#000000",
)
_WIDTH = 8.0
_DPI = 130
_HATCHES = ("", "///", "...", "xx")  # where there is no colour in print
_DASH = 7.0  # points of a curve before the next one's turn, where they lie on each other


class Picture(NamedTuple):
    """A picture in a file.

    Attributes:
        title: what it shows.
        path: of the file.
        is_timed: whether it shows what clocks said.
    """

    title: str
    path: Path
    is_timed: bool


def draw(found: dict[str, Any], folder: Path) -> list[Picture]:
    """Draw everything that :func:`report.read` has found."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # its cache of fonts is no news
    folder.mkdir(parents=True, exist_ok=True)
    results, checks = found["results"], found["verification"]
    where = _where(found["experiment"])
    drawn: list[Picture] = []

    def add(title: str, name: str, figure: Figure, *, is_timed: bool) -> None:
        figure.savefig(folder / name, dpi=_DPI)
        drawn.append(Picture(title, folder / name, is_timed))

    loops, requests = trained(results), decoded(results)
    if loops:
        title = "Bytes that a rank sends in a step, counted"
        add(title, "bytes.png", _sent(loops), is_timed=False)
    if rows := outlook.claimed(outlook.rows(found["experiment"])):
        title = "TPS and TPOT on GPUs, predicted and claimed"
        add(title, "outlook.png", _outlook(rows), is_timed=False)
    if loops:
        of = "loss on answers" if found["experiment"].sft else "loss"
        add(f"{of.capitalize()} of every step", "losses.png", _losses(loops, of), is_timed=False)
    helix = [
        (check, found["cuts"][check["run"]])
        for check in checks
        if check["check"] == "load" and found["cuts"][check["run"]]["m"]
    ]
    if helix:
        title = "Load of every rank, over the mean"
        add(title, "load.png", load_map.draw(helix, _WIDTH), is_timed=False)
    add("TPS and TPOT, measured", "tps_tpot.png", _bars(results, where), is_timed=True)
    if loops:
        title = "Parts of a step's time, measured"
        add(title, "breakdown.png", _breakdown(loops, where), is_timed=True)
    if requests:
        title = "Time to the first token and between tokens, measured"
        add(title, "decode.png", _latencies(requests, where), is_timed=True)
    return drawn


def _where(experiment: ExperimentConfig) -> str:
    """What clocks were read on, and what that is worth."""
    ranks = f"{experiment.world_size} {experiment.device.upper()} ranks"
    if experiment.device == "cpu":
        return f"{ranks} that share one machine's cores: these times say nothing about GPUs"
    return ranks


def _label(result: dict[str, Any]) -> str:
    phase = "" if result["phase"] == "train" else f"\n{result['phase']}"
    return f"{result['model']}\n{result['layout']}{phase}"


def _colours(results: list[dict[str, Any]]) -> list[str]:
    layouts = list(dict.fromkeys(result["layout"] for result in results))
    return [_COLOURS[layouts.index(result["layout"]) % len(_COLOURS)] for result in results]


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(results: list[dict[str, Any]], where: str) -> Figure:
    """A row of panels for each phase, whose figures are of different sizes."""
    phases = list(dict.fromkeys(result["phase"] for result in results))
    by_phase = [[one for one in results if one["phase"] == phase] for phase in phases]
    height = 0.55 * len(results) + 0.9 * len(phases) + 0.7  # of the title and the legend
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(where, fontsize=9)
    heights = [len(own) + 1 for own in by_phase]
    grid = figure.subplots(len(phases), 2, squeeze=False, height_ratios=heights)
    for (tps, tpot), own in zip(grid, by_phase, strict=True):
        for axes, key, unit in (
            (tps, "tokens_per_s", "TPS (tokens/s), more is better"),
            (tpot, "tpot_ms", "TPOT (ms), less is better"),
        ):
            values = [result[key] for result in own]
            bars = axes.barh(
                range(len(own)), values, color=_colours(own), edgecolor="black", lw=0.5
            )
            labels = [significant(value) for value in values]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
            axes.set_yticks(range(len(own)), [_label(result) for result in own], fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.25)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter("{x:,.12g}")
            axes.set_xlabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
        tpot.set_yticklabels([])
    looks = dict(zip([result["layout"] for result in results], _colours(results), strict=True))
    handles = [
        Patch(facecolor=colour, edgecolor="black", lw=0.5, label=name)
        for name, colour in looks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _breakdown(results: list[dict[str, Any]], where: str) -> Figure:
    figure, ((axes,),) = _figure(1, 1, 0.55 * len(results) + 2.0)
    axes.set_title(where, fontsize=9)
    left = [0.0] * len(results)
    for part, colour, hatch in zip(PARTS, _COLOURS, _HATCHES, strict=False):
        values = [result["breakdown_ms"][part] for result in results]
        name = part.replace("_", " ")
        axes.barh(
            range(len(results)),
            values,
            left=left,
            label=name,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            lw=0.5,
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(results)), [_label(result) for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(left, default=1.0))
    axes.xaxis.set_major_formatter("{x:,.12g}")
    axes.set_xlabel("ms of a step, mean over ranks, median over steps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


def _sent(results: list[dict[str, Any]]) -> Figure:
    """A bar a run, with a piece for each axis."""
    figure, ((axes,),) = _figure(1, 1, 0.55 * len(results) + 1.6)
    sent = [by_axis(result) for result in results]
    left = [0.0] * len(results)
    places = range(len(results))
    for name, colour in zip(AXES_SHOWN, _COLOURS, strict=True):
        values = [own.get(name, 0.0) / 1e6 for own in sent]
        if any(values):
            look = {"label": name, "color": colour, "edgecolor": "white", "lw": 0.5}
            axes.barh(places, values, left=left, **look)
            left = [a + b for a, b in zip(left, values, strict=True)]
    for place, value in zip(places, left, strict=True):
        axes.text(value, place, f" {significant(value)}", va="center", fontsize=8)
    axes.set_yticks(places, [_label(result) for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MB, mean over ranks")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _outlook(rows: list[outlook.Row]) -> Figure:
    """A panel for each model and phase: what is predicted for each machine, and what is claimed."""
    cases = list(dict.fromkeys((row["model"], row["phase"]) for row in rows))
    machines = list(dict.fromkeys(row["hardware"] for row in rows))
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    figure, grid = _figure(len(cases), 2, 0.36 * len(layouts) * (len(machines) + 1) + 1.6)
    looks = [*((f"predicted, {name}", name) for name in machines), ("claimed", None)]
    thickness = 0.8 / len(looks)
    for panels, case in zip(grid, cases, strict=True):
        own = [row for row in rows if (row["model"], row["phase"]) == case]
        for axes, key, unit in (
            (panels[0], "tokens_per_s", "TPS (tokens/s), more is better"),
            (panels[1], "tpot_ms", "TPOT (ms), less is better"),
        ):
            for number, (label, machine) in enumerate(looks):
                values = [_figure_of(own, layout, machine, key) for layout in layouts]
                places = [place + number * thickness for place in range(len(layouts))]
                hatch = "" if machine else "///"
                bars = axes.barh(
                    places,
                    values,
                    thickness,
                    label=label,
                    color=_COLOURS[number] if machine else "white",
                    edgecolor="black",
                    hatch=hatch,
                    lw=0.5,
                )
                words = [significant(value) if value else "" for value in values]
                axes.bar_label(bars, words, padding=3, fontsize=7)
            middle = thickness * (len(looks) - 1) / 2
            ticks = [place + middle for place in range(len(layouts))]
            axes.set_yticks(ticks, layouts if axes is panels[0] else [""] * len(layouts), size=8)
            axes.invert_yaxis()
            axes.margins(x=0.25)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter("{x:,.12g}")
            axes.set_xlabel(unit, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_title(" ".join(case), fontsize=10, loc="left")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _figure_of(rows: list[outlook.Row], layout: str, machine: str | None, key: str) -> float:
    """A machine's prediction; without a machine what is claimed, 0 for nothing."""
    own = [row for row in rows if row["layout"] == layout]
    if machine is None:
        return (own[0]["claimed"] or {}).get(key, 0.0) if own else 0.0
    return next((row[key] for row in own if row["hardware"] == machine), 0.0)


def _losses(results: list[dict[str, Any]], of: str) -> Figure:
    cases = list(dict.fromkeys((result["model"], result["phase"]) for result in results))
    figure, ((*panels,),) = _figure(1, len(cases), 3.4)
    for axes, case in zip(panels, cases, strict=True):
        own = [result for result in results if (result["model"], result["phase"]) == case]
        for place, (result, colour) in enumerate(zip(own, _colours(own), strict=True)):
            steps = range(1, len(result["losses"]) + 1)
            # Exact layouts lie on each other: the first is broad, and seen under the others, which
            # take turns in dashes.
            look: dict[str, Any] = {"lw": 6, "color": "#bbbbbb"}
            if place > 0:
                gap = _DASH * max(1, len(own) - 2)
                dashes = (_DASH * (place - 1), (_DASH, gap))
                look = {"lw": 1.8, "color": colour, "linestyle": dashes}
            axes.plot(steps, result["losses"], label=result["layout"], **look)
        axes.set_title(" ".join(case), fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, handlelength=4)
    panels[0].set_ylabel(of)
    return figure


def _latencies(results: list[dict[str, Any]], where: str) -> Figure:
    """Time to first token, and inter-token latency with its median and 99th percentile marked."""
    figure, ((first, between),) = _figure(1, 2, 0.55 * len(results) + 2.0)
    figure.suptitle(where, fontsize=9)
    places = range(len(results))
    for axes, key, unit in (
        (first, "ttft_ms", "time to first token (ms)"),
        (between, "itl_ms", "inter-token latency (ms), mean"),
    ):
        values = [result[key] for result in results]
        axes.barh(places, values, color=_colours(results))
        axes.set_yticks(places, [_label(result) for result in results], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    for key, mark, name in (("itl_p50_ms", "|", "p50"), ("itl_p99_ms", "x", "p99")):
        known = [(result[key], place) for result, place in zip(results, places, strict=True)]
        known = [point for point in known if point[0] is not None]
        if known:
            between.plot(*zip(*known, strict=True), mark, color="black", markersize=9, label=name)
    between.set_yticklabels([])
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure

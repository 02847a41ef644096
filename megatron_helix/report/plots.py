"""The report's pictures, as PNG files. Colours are told apart without seeing red or green."""

import logging
from pathlib import Path
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from megatron_helix.experiment.metrics import PARTS
from megatron_helix.experiment.results import decoded, significant, trained

_COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#999999", "#009e73", "#cc79a7", "#d55e00", "#f0e442")
_WIDTH = 8.0
_DPI = 130
_HATCHES = ("", "///", "...", "xx")  # where there is no colour in print
_READABLE = 8  # figures in a row of a heat map that stand apart
_DARK = 0.45  # luminance of a tile on which white is read better than black

Pictures = list[tuple[str, Path]]


def draw(found: dict[str, Any], folder: Path) -> Pictures:
    """Draw everything that :func:`report.read` has found.

    Returns:
        Titles and files.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # its cache of fonts is no news
    folder.mkdir(parents=True, exist_ok=True)
    results, checks = found["results"], found["verification"]
    pictures = [("TPS and TPOT, measured", "tps_tpot.png", _bars(results))]
    if loops := trained(results):
        pictures += [
            ("Where a step's time goes, measured", "breakdown.png", _breakdown(loops)),
            ("Loss of every step", "losses.png", _losses(loops)),
        ]
    if requests := decoded(results):
        title = "Time to the first token and between tokens, measured"
        pictures.append((title, "decode.png", _latencies(requests)))
    helix = [
        (check, found["cuts"][check["run"]])
        for check in checks
        if check["check"] == "load" and found["cuts"][check["run"]]["m"]
    ]
    if helix:
        pictures.append(("Load of every rank, over the mean", "load.png", _load(helix)))
    drawn = []
    for title, name, figure in pictures:
        figure.savefig(folder / name, dpi=_DPI)
        drawn.append((title, folder / name))
    return drawn


def _label(result: dict[str, Any]) -> str:
    phase = "" if result["phase"] == "train" else f"\n{result['phase']}"
    return f"{result['model']}\n{result['layout']}{phase}"


def _colours(results: list[dict[str, Any]]) -> list[str]:
    layouts = list(dict.fromkeys(result["layout"] for result in results))
    return [_COLOURS[layouts.index(result["layout"]) % len(_COLOURS)] for result in results]


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(results: list[dict[str, Any]]) -> Figure:
    """A row of panels for each phase, whose figures are of different sizes."""
    phases = list(dict.fromkeys(result["phase"] for result in results))
    by_phase = [[one for one in results if one["phase"] == phase] for phase in phases]
    figure = Figure(figsize=(_WIDTH, 0.55 * len(results) + 0.9 * len(phases)), layout="constrained")
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
    return figure


def _breakdown(results: list[dict[str, Any]]) -> Figure:
    figure, ((axes,),) = _figure(1, 1, 0.55 * len(results) + 1.6)
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
    axes.set_xlabel("ms of a step, mean over ranks and steps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


def _losses(results: list[dict[str, Any]]) -> Figure:
    cases = list(dict.fromkeys((result["model"], result["phase"]) for result in results))
    figure, ((*panels,),) = _figure(1, len(cases), 3.4)
    for axes, case in zip(panels, cases, strict=True):
        own = [result for result in results if (result["model"], result["phase"]) == case]
        for place, (result, colour) in enumerate(zip(own, _colours(own), strict=True)):
            steps = range(1, len(result["losses"]) + 1)
            # The first curve is broad, so that it is seen under one that lies on it.
            width, style = (5, "-") if place == 0 else (1.5, "--")
            alpha = 0.5 if place == 0 else 1.0
            label = result["layout"]
            axes.plot(
                steps, result["losses"], style, lw=width, color=colour, label=label, alpha=alpha
            )
        axes.set_title(" ".join(case), fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("loss")
    return figure


def _latencies(results: list[dict[str, Any]]) -> Figure:
    """Time to first token, and inter-token latency with its median and 99th percentile marked."""
    figure, ((first, between),) = _figure(1, 2, 0.55 * len(results) + 1.6)
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
        values = [result[key] for result in results]
        between.plot(values, places, mark, color="black", markersize=9, label=name)
    between.set_yticklabels([])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _load(helix: list[tuple[dict[str, Any], dict[str, Any]]]) -> Figure:
    """A row for each run, a panel for each load: m columns, n rows, mean over replicas."""
    kinds = list(helix[0][0]["ratios"])
    figure, grid = _figure(len(helix), len(kinds), 2.1 * len(helix) + 0.5)
    shown = Normalize(0.5, 1.5)
    image: Any = None
    for panels, (check, cut) in zip(grid, helix, strict=True):
        for axes, kind in zip(panels, kinds, strict=True):
            tiles = _tiles(check["loads"][kind], cut)
            image = axes.imshow(tiles, cmap="PuOr", norm=shown, aspect="auto")
            for i, row in enumerate(tiles if cut["m"] <= _READABLE else []):
                for j, value in enumerate(row):
                    red, green, blue, _ = image.cmap(shown(value))
                    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK
                    ink = "white" if dark else "black"
                    axes.text(j, i, f"{value:.2f}", color=ink, ha="center", va="center", size=7)
            axes.set_xticks(range(cut["m"]))
            axes.set_yticks(range(cut["n"]))
            axes.tick_params(labelsize=7, length=0)
            axes.set_title(kind, fontsize=9)
        panels[0].set_ylabel(f"{check['run']}\nhead group", fontsize=8)
        panels[0].set_xlabel("segment", fontsize=8)
    figure.colorbar(image, ax=grid, label="load / mean", shrink=0.8, aspect=10 * len(helix))
    return figure


def _tiles(values: list[float], cut: dict[str, Any]) -> list[list[float]]:
    """``values`` of all ranks as ``[n, m]``, over their mean."""
    sums = [[0.0] * cut["m"] for _ in range(cut["n"])]
    for place, value in zip(cut["ranks"], values, strict=True):
        sums[place["head_group"]][place["segment"]] += value or 0.0
    mean = sum(map(sum, sums)) / (cut["m"] * cut["n"]) or 1.0
    return [[value / mean for value in row] for row in sums]

"""The load of every rank of helix runs, as maps of the m x n partition."""

from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

_READABLE = 8  # figures in a row of a map that stand apart
_DARK = 0.45  # luminance of a tile on which white is read better than black


def draw(helix: list[tuple[dict[str, Any], dict[str, Any]]], width: float) -> Figure:
    """A row for each run, a panel for each load: m columns, n rows, mean over replicas.

    Args:
        helix: the check of a run's load, and its partition.
        width: inches.
    """
    kinds = list(helix[0][0]["ratios"])
    figure = Figure(figsize=(width, 2.1 * len(helix) + 0.5), layout="constrained")
    grid = figure.subplots(len(helix), len(kinds), squeeze=False)
    drawn = [[_tiles(check["loads"][kind], cut) for kind in kinds] for check, cut in helix]
    values = [value for run in drawn for tiles in run for row in tiles for value in row]
    shown = TwoSlopeNorm(1.0, min(0.5, *values), max(1.5, *values))
    image: Any = None
    for panels, (check, cut), run in zip(grid, helix, drawn, strict=True):
        for axes, kind, tiles in zip(panels, kinds, run, strict=True):
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

"""Draws docs/figures/*.svg: the partition, what each exchange moves, a model's text, rewards.

``make docs`` calls it.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from terminal import terminal

# The same bytes on every machine.
mpl.rcParams.update({"svg.hashsalt": "helix", "font.family": "DejaVu Sans", "font.size": 10})
ROOT = Path(__file__).parents[1]
COLORS = ("#3b6fb6", "#d9822b", "#4f9d69", "#a05195")
INK, PAPER = "#30343b", "#f1f3f5"


def figure(width: float, height: float) -> Axes:
    """Axes without a frame, one unit an inch."""
    axes = plt.figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(
    axes: Axes,
    at: tuple[float, float],
    size: tuple[float, float],
    *,
    color: str = PAPER,
    label: str = "",
) -> None:
    """A rectangle with its lower left corner ``at``, and a label in it."""
    axes.add_patch(Rectangle(at, *size, facecolor=color, edgecolor=INK, linewidth=0.8))
    ink = "white" if color in COLORS else INK
    middle = (at[0] + size[0] / 2, at[1] + size[1] / 2)
    axes.text(*middle, label, ha="center", va="center", color=ink, fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow."""
    shape = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "linewidth": 1.1}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=2, shrinkB=2, **shape))


def partition() -> Axes:
    """16 heads of 512 channels on 4 x 4 ranks."""
    axes = figure(7.6, 4.3)
    for i in range(4):
        axes.text(1.45, 3.0 - 0.7 * i, f"heads {4 * i}..{4 * i + 3}", ha="right", va="center")
        for j in range(4):
            at = (1.6 + 1.2 * j, 2.65 - 0.7 * i)
            box(axes, at, (1.2, 0.7), color=COLORS[j], label=f"rank {4 * i + j}")
    for j in range(4):
        axes.text(2.2 + 1.2 * j, 3.45, f"segment {j}", ha="center")
    axes.text(4.0, 3.85, "head dimension: m = 4 segments", ha="center", weight="bold")
    axes.text(0.2, 1.95, "n = 4 head groups", rotation=90, va="center", weight="bold")
    mark = {"fill": False, "edgecolor": INK, "linewidth": 2.6}
    axes.add_patch(Rectangle((1.57, 1.92), 4.86, 0.76, **mark))
    axes.add_patch(Rectangle((3.97, 0.52), 1.26, 2.86, linestyle="--", **mark))
    axes.text(6.55, 2.3, "dim group\n(same heads)", va="center")
    axes.text(4.6, 0.2, "head-axis group (same segment)", ha="center")
    return axes


class Flow:
    """Two ranks of a dim group, one above the other, through the steps of an exchange."""

    SIDE = 1.1

    def __init__(self, steps: int):
        self.axes = figure(2.3 * steps, 4.4)
        self.x = 0.9
        for rank, y in self._rows():
            self.axes.text(0.1, y + self.SIDE / 2, f"rank\n(i, {rank})", va="center")

    def _rows(self) -> list[tuple[int, float]]:
        return [(0, 2.35), (1, 0.6)]

    def step(self, title: str, parts: str, caption: str) -> None:
        """One matrix a rank.

        Args:
            title: what it is.
            parts: what of it a rank has: ``rows`` (a share of the tokens), ``columns`` (a segment
                of the channels), ``whole``, or ``sum`` (all of it, as one of two terms).
            caption: its axes.
        """
        self.axes.text(self.x + self.SIDE / 2, 3.95, title, ha="center", va="center")
        for rank, y in self._rows():
            box(self.axes, (self.x, y), (self.SIDE, self.SIDE))
            half, side = self.SIDE / 2, self.SIDE
            at, size, label = (self.x, y), (side, side), ""
            if parts == "rows":
                at, size = (self.x, y + half * (1 - rank)), (side, half)
            elif parts == "columns":
                at, size = (self.x + half * rank, y), (half, side)
            elif parts == "sum":
                label = "one of\nm terms"
            color = COLORS[rank] if parts != "whole" else "#8a929c"
            box(self.axes, at, size, color=color, label=label)
        self.axes.text(self.x + self.SIDE / 2, 0.3, caption, ha="center", va="center", fontsize=9)
        self.x += self.SIDE

    def move(self, what: str, *, exchanged: bool) -> None:
        """An arrow to the next step; crossed where ranks exchange."""
        start, end = self.x + 0.05, self.x + 1.15
        (_, upper), (_, lower) = [(rank, y + self.SIDE / 2) for rank, y in self._rows()]
        for y, other in ((upper, lower), (lower, upper)):
            arrow(self.axes, (start, y), (end, y))
            if exchanged:
                arrow(self.axes, (start, y), (end, other))
        middle = (upper + lower) / 2
        text = {"ha": "center", "va": "center", "fontsize": 9, "backgroundcolor": "white"}
        weight = "bold" if exchanged else "normal"
        self.axes.text((start + end) / 2, middle if exchanged else upper + 0.35, what, **text).set(
            weight=weight
        )
        self.x += 1.2


def activations() -> Axes:
    """QKV and context go over the dim axis."""
    flow = Flow(4)
    flow.step("QKV", "columns", "tokens x channels")
    flow.move("all-to-all", exchanged=True)
    flow.step("QKV", "rows", "tokens x channels")
    flow.move("attention", exchanged=False)
    flow.step("context", "rows", "tokens x channels")
    flow.move("all-to-all", exchanged=True)
    flow.step("context", "columns", "tokens x channels")
    return flow.axes


def weights() -> Axes:
    """Segments of the weights go over the dim axis, tokens stay."""
    flow = Flow(5)
    flow.step("$W_{qkv}$", "columns", "hidden x channels")
    flow.move("all-gather", exchanged=True)
    flow.step("$W_{qkv}$", "whole", "hidden x channels")
    flow.move("own tokens", exchanged=False)
    flow.step("QKV", "rows", "tokens x channels")
    flow.move("attention", exchanged=False)
    flow.step("context", "rows", "tokens x channels")
    flow.move("$W_o$, gathered", exchanged=False)
    flow.step("output", "rows", "tokens x hidden")
    return flow.axes


def scores() -> Axes:
    """Partial scores are summed over the dim axis."""
    flow = Flow(4)
    flow.step("Q, K, V", "columns", "tokens x channels")
    flow.move("$Q_j K_j^T$", exchanged=False)
    flow.step("scores", "sum", "tokens x tokens")
    flow.move("all-reduce", exchanged=True)
    flow.step("scores", "whole", "tokens x tokens")
    flow.move("softmax, $V_j$", exchanged=False)
    flow.step("context", "columns", "tokens x channels")
    return flow.axes


def grpo() -> Axes:
    """Rewards of examples/grpo: three seeds, helix over stock."""
    seeds = json.loads((ROOT / "examples" / "grpo" / "results.json").read_text())["seeds"]
    axes = plt.figure(figsize=(7.2, 3.2), layout="constrained").add_subplot()
    for color, (seed, found) in zip(COLORS, seeds.items(), strict=False):
        turns = range(1, len(found["reward"]["tp4"]) + 1)
        axes.plot(turns, found["reward"]["tp4"], color=color, linewidth=6, alpha=0.3)
        label = f"seed {seed}: helix 4 x 1, and TP=4 (wide)"
        axes.plot(turns, found["reward"]["helix_4x1"], color=color, linewidth=1.4, label=label)
    axes.set(xlabel="turn", ylabel="mean reward of a turn")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return axes


def main(folder: Path) -> None:
    """Write the figures to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (partition, activations, weights, scores, grpo):
        path = folder / f"{draw.__name__}.svg"
        draw()
        plt.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close("all")
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    text = (Path(__file__).parent / "generated.txt").read_text()
    (folder / "generated.svg").write_text(terminal(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")

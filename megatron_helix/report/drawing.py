"""A graph as Mermaid, Graphviz dot or SVG text.

Nodes carry ``label``, ``group`` (drawn as one box) and ``place``, ``(column, row)``; edges may
carry ``bytes``.
"""

import io
from collections.abc import Sequence
from typing import Any

import networkx as nx

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment.dag import Node, graph

FORMATS = ("mermaid", "dot", "svg")


def draw(made: nx.DiGraph, form: str) -> str:
    """The graph in one of :data:`FORMATS`.

    Raises:
        UserError: for another one.
    """
    if form not in FORMATS:
        raise UserError(f"--format: must be one of {', '.join(FORMATS)}, got {form!r}")
    return {"mermaid": _mermaid, "dot": _dot, "svg": _svg}[form](made)


def experiment_graph(nodes: Sequence[Node]) -> nx.DiGraph:
    """The graph of an experiment's nodes, a group for each component."""
    made = graph(nodes)
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for node in nodes:
        group, _, label = node.name.partition("/")
        column = columns.setdefault(group, len(columns))
        row = rows[group] = rows.get(group, -1) + 1
        made.nodes[node.name].update(label=label or group, group=group, place=(column, row))
    for data in made.nodes.values():
        column, row = data["place"]
        data["place"] = column, row - rows[data["group"]] / 2
    return made


def _identities(made: nx.DiGraph) -> dict[Any, str]:
    return {name: f"n{place}" for place, name in enumerate(made)}


def _groups(made: nx.DiGraph) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for name, data in made.nodes.items():
        groups.setdefault(data["group"], []).append(name)
    return groups


def _size(sent: float) -> str:
    """Bytes for a reader."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if sent >= size:
            return f"{sent / size:.4g} {unit}"
    return f"{sent:.4g} B"


def _mermaid(made: nx.DiGraph) -> str:
    name = _identities(made)
    lines = ["flowchart LR"]
    for place, (group, members) in enumerate(_groups(made).items()):
        lines.append(f'  subgraph g{place}["{group}"]')
        lines += [f'    {name[member]}["{made.nodes[member]["label"]}"]' for member in members]
        lines.append("  end")
    for start, end, data in made.edges(data=True):
        label = f'|"{_size(data["bytes"])}"|' if "bytes" in data else ""
        lines.append(f"  {name[start]} -->{label} {name[end]}")
    return "\n".join(lines)


def _dot(made: nx.DiGraph) -> str:
    name = _identities(made)
    lines = ["digraph {", "  rankdir=LR; node [shape=box];"]
    for place, (group, members) in enumerate(_groups(made).items()):
        lines.append(f'  subgraph cluster_{place} {{ label="{group}";')
        lines += [
            f'    {name[member]} [label="{made.nodes[member]["label"]}"];' for member in members
        ]
        lines.append("  }")
    for start, end, data in made.edges(data=True):
        label = f' [label="{_size(data["bytes"])}"]' if "bytes" in data else ""
        lines.append(f"  {name[start]} -> {name[end]}{label};")
    return "\n".join([*lines, "}"])


def _svg(made: nx.DiGraph) -> str:
    from matplotlib.figure import Figure

    places: dict[Any, tuple[float, float]] = {
        name: (data["place"][0], -data["place"][1]) for name, data in made.nodes.items()
    }
    xs, ys = zip(*places.values(), strict=True)
    size = (1.9 * (max(xs) - min(xs) + 1), 0.5 * (max(ys) - min(ys) + 2.4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    boxes = {}
    for name, (x, y) in places.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#444444", "pad": 0.25}
        label = made.nodes[name]["label"].replace(", ", "\n").replace(" of ", " of\n")
        boxes[name] = axes.text(
            x, y, label, ha="center", va="center", fontsize=6, bbox=box, zorder=3
        )
    for start, end, data in made.edges(data=True):
        colour, width = ("#0072b2", 0.4) if "bytes" in data else ("#444444", 0.7)
        ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        arrow = {"arrowstyle": "->", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(
            "", xy=places[end], xytext=places[start], arrowprops={**arrow, **ends}, zorder=1
        )
    for text, x, y in [*_headings(made, places), *_sizes(made, places)]:
        axes.text(x, y, text, ha="center", va="center", fontsize=7, weight="bold")
    axes.set_xlim(min(xs) - 1.2, max(xs) + 0.6)
    axes.set_ylim(min(ys) - 0.8, max(ys) + 1.6)
    axes.set_axis_off()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def _sizes(
    made: nx.DiGraph, places: dict[Any, tuple[float, float]]
) -> list[tuple[str, float, float]]:
    """What every edge between two columns carries, above them."""
    top = max(y for _, y in places.values())
    found: dict[tuple[float, float], set[str]] = {}
    for start, end, data in made.edges(data=True):
        if "bytes" in data:
            columns = places[start][0], places[end][0]
            axis = f"{data['axis']} axis: " if "axis" in data else ""
            found.setdefault(columns, set()).add(f"{axis}{_size(data['bytes'])}")
    return [
        ("\n".join(sorted(texts)), (left + right) / 2, top + 0.8 + 0.35 * (left % 1 > 0))
        for (left, right), texts in found.items()
    ]


def _headings(
    made: nx.DiGraph, places: dict[Any, tuple[float, float]]
) -> list[tuple[str, float, float]]:
    """The groups' names: above where a group is a column, else to the left of its row."""
    left, top = min(x for x, _ in places.values()), max(y for _, y in places.values())
    found = []
    for group, members in _groups(made).items():
        columns = {places[member][0] for member in members}
        if len(columns) == 1:
            found.append((group.replace("_", "\n"), *columns, top + 0.8))
        else:
            found.append((group.replace(", ", "\n"), left - 0.8, places[members[0]][1]))
    return found

"""A graph as Mermaid, Graphviz dot or SVG text.

Nodes carry ``label``, ``group`` (drawn as one box) and ``place``, ``(column, row)``; edges may carry
``bytes``.
"""

import io
from collections.abc import Sequence
from typing import Any

import networkx as nx

from megatron_helix.experiment.dag import Node, graph

FORMATS = ("mermaid", "dot", "svg")


def draw(made: nx.DiGraph, form: str) -> str:
    """The graph in one of :data:`FORMATS`.

    Raises:
        ValueError: for another one.
    """
    if form not in FORMATS:
        raise ValueError(f"--format: must be one of {', '.join(FORMATS)}, got {form!r}")
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
    for group, members in _groups(made).items():
        lines.append(f'  subgraph {group.replace(" ", "_")}["{group}"]')
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

    places = {name: (column, -row) for name, (column, row) in made.nodes(data="place")}
    columns = len({column for column, _ in places.values()})
    rows = max(row for _, row in places.values()) - min(row for _, row in places.values()) + 1
    figure = Figure(figsize=(2.1 * columns, 0.45 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    sent = [(start, end) for start, end, data in made.edges(data=True) if "bytes" in data]
    plain = [edge for edge in made.edges if edge not in set(sent)]
    for edges, colour, width in ((plain, "#444444", 0.8), (sent, "#0072b2", 0.4)):
        for start, end in edges:
            axes.annotate(
                "",
                xy=places[end],
                xytext=places[start],
                arrowprops={
                    "arrowstyle": "->",
                    "color": colour,
                    "lw": width,
                    "shrinkA": 30,
                    "shrinkB": 34,
                },
            )
    for name, (x, y) in places.items():
        axes.text(
            *(x, y, made.nodes[name]["label"]),
            ha="center",
            va="center",
            fontsize=6.5,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "#444444"},
        )
    for text, x, y in made.graph.get("headings", _column_headings(made, places)):
        axes.text(x, y, text, ha="center", va="bottom", fontsize=7, weight="bold")
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
    axes.set_ylim(min(ys) - 0.8, max(ys) + 1.4)
    axes.set_axis_off()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def _column_headings(
    made: nx.DiGraph, places: dict[Any, tuple[float, float]]
) -> list[tuple[str, float, float]]:
    top = max(y for _, y in places.values()) + 0.7
    found = {made.nodes[name]["group"]: x for name, (x, _) in places.items()}
    return [(group.replace("_", "\n"), x, top) for group, x in found.items()]

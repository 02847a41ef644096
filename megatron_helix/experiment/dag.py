"""A directed acyclic graph of named steps that does only what is missing or changed.

A node's key is a hash of its inputs and of what the nodes it needs have made. What it made is kept
in ``nodes/NAME.json``: the key, a JSON value, and size and hash of every file. A node whose key is
the same and whose files are still there is not done again. A record appears when its node is
finished, in one piece, so that an interrupt loses no finished node and keeps no unfinished one.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError

_HASHED_BYTES = 64 << 20  # of a larger file the size has to do


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a node has made.

    Attributes:
        value: for the nodes that need it and for the record; must be JSON.
        files: what it has written.
    """

    value: Any
    files: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """A step.

    Attributes:
        name: of the node; ``group/name`` where several do the same kind of work.
        inputs: what the result depends on beside the nodes it needs; must be JSON.
        action: called with the values of the nodes it needs, by name.
        needs: names of nodes.
    """

    name: str
    inputs: Any
    action: Callable[[dict[str, Any]], Made]
    needs: tuple[str, ...] = ()


def graph(nodes: Sequence[Node]) -> nx.DiGraph:
    """The nodes with an edge from each to those that need it.

    Raises:
        ValueError: for two nodes of one name, a need that no node meets, or a cycle.
    """
    made = nx.DiGraph()
    for node in nodes:
        if node.name in made:
            raise ValueError(f"dag: two nodes are named {node.name}; names must differ")
        made.add_node(node.name, node=node)
    for node in nodes:
        for need in node.needs:
            if need not in made:
                raise ValueError(f"dag: {node.name} needs {need}, and no node is named so")
            made.add_edge(need, node.name)
    if not nx.is_directed_acyclic_graph(made):
        cycle = " -> ".join(edge[0] for edge in nx.find_cycle(made))
        raise ValueError(f"dag: must have no cycle, got {cycle}")
    return made


def run(
    nodes: Sequence[Node], folder: Path, notify: Callable[[str, str], None] | None = None
) -> dict[str, Any]:
    """Do what is missing or changed, in order.

    Args:
        nodes: of the graph.
        folder: takes the records; the nodes' files lie in it too.
        notify: called with a node's name and ``kept``, ``started`` or ``done``.

    Returns:
        The value of every node by name.

    Raises:
        UserError: for the record of a node that was torn or edited.
    """
    notify = notify or (lambda name, state: None)
    order = {node.name: place for place, node in enumerate(nodes)}
    records: dict[str, dict[str, Any]] = {}
    for name in nx.lexicographical_topological_sort(graph(nodes), key=lambda name: order[name]):
        node = nodes[order[name]]
        needed = {need: records[need] for need in node.needs}
        made_before = {need: [record["value"], record["files"]] for need, record in needed.items()}
        key = digest([node.inputs, made_before])
        record = read_record(folder, name)
        if record and record["key"] == key and _files_stand(folder, record["files"]):
            notify(name, "kept")
        else:
            notify(name, "started")
            made = node.action({need: record["value"] for need, record in needed.items()})
            written = {str(path.relative_to(folder)): seen(path) for path in made.files}
            # Through JSON once, so that a value is the same now and when it is read again.
            record = json.loads(
                json.dumps({"node": name, "key": key, "value": made.value, "files": written})
            )
            path = _record_path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, json.dumps(record, indent=1))
            notify(name, "done")
        records[name] = record
    return {name: record["value"] for name, record in records.items()}


def digest(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished node; None without one.

    Raises:
        UserError: for one that was torn or edited.
    """
    path = _record_path(folder, name)
    if not path.exists():
        return None
    remedy = "remove it: the next `helix run` does again what it was the record of"
    record = files.read_json(path, remedy)
    whole = isinstance(record, dict) and {"key", "value", "files"} <= record.keys()
    if not whole or not isinstance(record["files"], dict):
        raise UserError(f"{path}: must be the record of a node, and was edited; {remedy}")
    return record


def _record_path(folder: Path, name: str) -> Path:
    return folder / "nodes" / f"{name}.json"


def seen(path: Path) -> list[Any]:
    """Size and hash of a file; of a large one without the hash."""
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return [size, None]
    return [size, hashlib.sha256(path.read_bytes()).hexdigest()]


def _files_stand(folder: Path, written: dict[str, list[Any]]) -> bool:
    return all(
        (folder / name).exists() and seen(folder / name) == then for name, then in written.items()
    )

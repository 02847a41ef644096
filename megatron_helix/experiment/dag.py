"""A directed acyclic graph of named steps that does only what is missing or changed.

A node's key is a hash of its inputs and of what the nodes it needs have made. What it made is kept
in ``nodes/NAME.json``: the key, a JSON value, and size and hash of every file. A node whose key is
the same and whose files are still there is not done again. A record appears when its node is
finished, in one piece, so that an interrupt loses no finished node and keeps no unfinished one.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

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
            files = {str(path.relative_to(folder)): seen(path) for path in made.files}
            # Through JSON once, so that a value is the same now and when it is read again.
            record = json.loads(
                json.dumps({"node": name, "key": key, "value": made.value, "files": files})
            )
            _write(_record_path(folder, name), record)
            notify(name, "done")
        records[name] = record
    return {name: record["value"] for name, record in records.items()}


def digest(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished node; None without one."""
    path = _record_path(folder, name)
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; made if missing.

    Raises:
        ValueError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            # Of the process, not of the file descriptor, which forked ranks inherit.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ValueError(
                f"--out: {folder} must be used by one run at a time, and process"
                f" {lock.read().strip() or 'unknown'} is at work in it; wait for it or give another"
                " folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _record_path(folder: Path, name: str) -> Path:
    return folder / "nodes" / f"{name}.json"


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.replace(path)


def seen(path: Path) -> list[Any]:
    """Size and hash of a file; of a large one without the hash."""
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return [size, None]
    return [size, hashlib.sha256(path.read_bytes()).hexdigest()]


def _files_stand(folder: Path, files: dict[str, list[Any]]) -> bool:
    return all(
        (folder / name).exists() and seen(folder / name) == then for name, then in files.items()
    )

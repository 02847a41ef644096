"""The engine: what is missing or changed is done, and nothing else."""

import multiprocessing as mp
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from megatron_helix.basics import files
from megatron_helix.experiment import dag
from megatron_helix.experiment.dag import Made, Node
from megatron_helix.report import drawing


def writes(folder: Path, name: str, value: Any = 1) -> Callable[[dict[str, Any]], Made]:
    """An action that writes a file and counts what it was given."""

    def action(values: dict[str, Any]) -> Made:
        path = folder / f"{name}.txt"
        path.write_text(f"{value} {sorted(values.items())}")
        return Made(value=[value, values], files=[path])

    return action


def chain(folder: Path, first: Any = 1) -> list[Node]:
    """a -> b -> d and a -> c -> d."""
    return [
        Node(name="a", inputs=first, action=writes(folder, "a", first)),
        Node(name="b", inputs=0, action=writes(folder, "b"), needs=("a",)),
        Node(name="c", inputs=0, action=writes(folder, "c"), needs=("a",)),
        Node(name="d", inputs=0, action=writes(folder, "d"), needs=("b", "c")),
    ]


def done(nodes: list[Node], folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Run; names of the nodes that were done, and their values."""
    names: list[str] = []
    values = dag.run(nodes, folder, lambda name, state: names.extend([name] * (state == "done")))
    return names, values


def test_a_second_run_does_nothing_and_gives_the_same_values(tmp_path: Path) -> None:
    first, values = done(chain(tmp_path), tmp_path)
    assert first == ["a", "b", "c", "d"]
    assert done(chain(tmp_path), tmp_path) == ([], values)


def test_a_changed_input_redoes_what_depends_on_it(tmp_path: Path) -> None:
    done(chain(tmp_path), tmp_path)
    assert done(chain(tmp_path, first=2), tmp_path)[0] == ["a", "b", "c", "d"]


def test_a_changed_input_with_the_same_result_stops_there(tmp_path: Path) -> None:
    done(chain(tmp_path), tmp_path)
    nodes = chain(tmp_path)
    nodes[1] = Node(name="b", inputs="other", action=nodes[1].action, needs=("a",))
    assert done(nodes, tmp_path)[0] == ["b"]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("1 changed")])
def test_a_file_that_is_gone_or_changed_is_made_again(
    tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    done(chain(tmp_path), tmp_path)
    harm(tmp_path / "c.txt")
    assert done(chain(tmp_path), tmp_path)[0] == ["c"]


@pytest.mark.parametrize("place", range(4))
def test_an_interrupt_loses_no_finished_node(tmp_path: Path, place: int) -> None:
    nodes = chain(tmp_path)

    def interrupted(values: dict[str, Any]) -> Made:
        raise KeyboardInterrupt

    broken = list(nodes)
    name, needs = nodes[place].name, nodes[place].needs
    broken[place] = Node(name=name, inputs=nodes[place].inputs, action=interrupted, needs=needs)
    before: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        dag.run(broken, tmp_path, lambda name, state: before.extend([name] * (state == "done")))
    after, values = done(nodes, tmp_path)
    assert before + after == ["a", "b", "c", "d"]
    (tmp_path / "fresh").mkdir()
    assert values == done(chain(tmp_path / "fresh"), tmp_path / "fresh")[1]


def test_bad_graphs_are_refused(tmp_path: Path) -> None:
    action = writes(tmp_path, "x")
    a = Node(name="a", inputs=0, action=action, needs=("b",))
    b = Node(name="b", inputs=0, action=action, needs=("a",))
    with pytest.raises(ValueError, match=r"must have no cycle, got [ab]"):
        dag.graph([a, b])
    with pytest.raises(ValueError, match="a needs b, and no node is named so"):
        dag.graph([a])
    with pytest.raises(ValueError, match="two nodes are named b"):
        dag.graph([b, b])


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        with files.locked(tmp_path, "--out"):
            there.send("held")
            there.recv()

    holder = context.Process(target=hold)
    holder.start()
    try:
        here.recv()
        with (
            pytest.raises(ValueError, match=f"one run at a time, and process {holder.pid} is at"),
            files.locked(tmp_path, "--out"),
        ):
            pass
    finally:
        here.send("let go")
        holder.join()
    with files.locked(tmp_path, "--out"):
        pass


@pytest.mark.parametrize("form", drawing.FORMATS)
def test_a_graph_is_drawn_with_every_node(tmp_path: Path, form: str) -> None:
    text = drawing.draw(drawing.experiment_graph(chain(tmp_path)), form)
    beginning = {"mermaid": "flowchart", "dot": "digraph", "svg": "<?xml"}[form]
    assert text.startswith(beginning)
    arrow = {"mermaid": " --> ", "dot": " -> ", "svg": "<!-- "}[form]
    assert text.count(arrow) >= 4


def test_a_drawing_can_be_read_by_mermaid_and_dot(tmp_path: Path) -> None:
    made = nx.DiGraph()
    made.add_node("a", label="attention, layer 0", group="rank 0, tile 0,0", place=(0, 0))
    made.add_node("b", label="add", group="rank 1, tile 0,1", place=(1, 1))
    made.add_edge("a", "b", bytes=2048, axis="dim")
    text = drawing.draw(made, "mermaid")
    # Mermaid's identifiers have no commas; what a reader sees may have them.
    assert re.findall(r"subgraph (\S+)\[(.*)\]", text) == [
        ("g0", '"rank 0, tile 0,0"'),
        ("g1", '"rank 1, tile 0,1"'),
    ]
    assert 'n0 -->|"2.048 kB"| n1' in text
    assert 'n0 -> n1 [label="2.048 kB"]' in drawing.draw(made, "dot")
    assert "dim axis: 2.048 kB" in drawing.draw(made, "svg")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format: must be one of mermaid, dot, svg, got 'gif'"):
        drawing.draw(drawing.experiment_graph(chain(tmp_path)), "gif")

"""The deployment of a layout as a graph: operators on devices, collectives as edges with bytes.

One micro-batch's forward pass. A node is an operator on a rank; an edge within a rank is data that
stays, an edge between ranks is what one sends the other, in bytes. A collective of p ranks in which
each sends S bytes is S / (p - 1) bytes from each to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from megatron_helix.experiment import partition, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run


@dataclass(frozen=True)
class Step:
    """An operator of every rank of a stage, and what its input has come over.

    Attributes:
        operator: its name.
        axis: group whose ranks send to each other; "" where the input is on the rank already.
        sent_bytes: by each rank, to all others of the group together.
    """

    operator: str
    axis: str = ""
    sent_bytes: float = 0.0


def build(
    experiment: ExperimentConfig, *, model: str | None, layout: str | None, layers: int | None
) -> nx.DiGraph:
    """The graph of one model and layout.

    Args:
        experiment: names them.
        model: by default the first.
        layout: by default the first helix one.
        layers: how many to draw from the first one; None for all.

    Raises:
        ValueError: for a name that the experiment does not have, or a layout that cannot run.
    """
    helix = [item.name for item in experiment.layouts if item.is_helix]
    run = Run(
        model=_named("--model", experiment.models, model),
        layout=_named("--layout", experiment.layouts, layout or next(iter(helix), None)),
        phase="prefill",
        precision=experiment.precision,
    )
    here = partition.deployment(experiment, run).check()
    cut = partition.describe(experiment, run)
    made = nx.DiGraph(model=run.model.name, layout=run.layout.name)
    per_stage = run.model.num_layers // here.stages
    shown = range(min(layers or run.model.num_layers, run.model.num_layers))
    for place in cut["ranks"]:
        _rank(made, run, here, place, [i for i in shown if i // per_stage == place["stage"]])
    _connect(made, cut, shown, per_stage, _stream_bytes(run, here))
    if not nx.is_directed_acyclic_graph(made):
        raise RuntimeError(f"the deployment of {run.name} has a cycle")
    return made


def _named(flag: str, items: Sequence[Any], name: str | None) -> Any:
    if name is None:
        return items[0]
    found = [item for item in items if item.name == name]
    if not found:
        names = ", ".join(item.name for item in items)
        raise ValueError(f"{flag}: must be one of {names}, got {name!r}")
    return found[0]


def _chunk_bytes(run: Run, here: Any) -> float:
    """A rank's chunk of the stream of one micro-batch."""
    tokens = here.batch.sequence_length * run.layout.micro_batch
    return tokens * run.model.hidden_size / here.tp * partition.ELEMENT_BYTES[run.precision]


def _stream_bytes(run: Run, here: Any) -> float:
    """What a rank hands to the next pipeline stage."""
    return _chunk_bytes(run, here)


def layer_steps(run: Run, here: Any) -> list[Step]:
    """The operators of one layer, in order."""
    chunk, T = _chunk_bytes(run, here), here.tp
    weights = run.layout.is_helix and here.plan.exchange == "weights"
    axis, ranks = ("head", run.layout.n) if weights else ("tp", T)
    stream = (ranks - 1) * chunk
    m = run.layout.m or 1
    element = partition.ELEMENT_BYTES[run.precision]
    tokens = here.batch.sequence_length * run.layout.micro_batch
    D, d = run.model.hidden_size, run.model.kv_channels
    H, K = run.model.num_attention_heads, run.model.query_groups
    swapped = (m - 1) / m * tokens * d / T * element
    by_activations = run.layout.is_helix and here.plan.exchange == "activations" and m > 1
    gather_qkv = (m - 1) * (H + 2 * K) * d * D / T * element
    steps = []
    if weights:
        steps.append(Step("gathered W_QKV", "dim", gather_qkv))
    steps.append(Step("QKV projection", axis, stream))
    steps.append(
        Step("attention", "dim", swapped * (H + 2 * K)) if by_activations else Step("attention")
    )
    if weights:
        steps.append(Step("gathered W_O", "dim", (m - 1) * H * d * D / T * element))
    steps.append(
        Step("output projection", "dim", swapped * H)
        if by_activations
        else Step("output projection")
    )
    steps.append(Step("add, norm", axis, stream))
    if run.model.num_experts:
        ep = run.layout.ep
        routed = (ep - 1) / ep * chunk * run.model.moe_router_topk
        steps += [Step("router"), Step("experts", "ep", routed), Step("combine", "ep", routed)]
        return steps
    F = run.model.ffn_hidden_size
    gather = (m - 1) * F * D / T * element
    gated = 2 if run.model.swiglu else 1
    steps += [Step("gathered W_1", "dim", gather * gated)] if weights else []
    steps.append(Step("MLP up", axis, stream))
    steps += [Step("gathered W_2", "dim", gather)] if weights else []
    steps += [Step("MLP down"), Step("add", axis, stream)]
    return steps


def _rank(made: nx.DiGraph, run: Run, here: Any, place: dict[str, Any], layers: list[int]) -> None:
    """The operators of one rank."""
    steps = layer_steps(run, here)
    tile = f", tile {place['head_group']},{place['segment']}" if "segment" in place else ""
    for layer in layers:
        for number, step in enumerate(steps):
            made.add_node(
                (place["rank"], layer, number),
                label=f"{step.operator}, layer {layer}",
                group=f"rank {place['rank']}{tile}",
                place=(layer * len(steps) + number, place["rank"]),
                step=step,
            )


def _connect(
    made: nx.DiGraph, cut: dict[str, Any], layers: range, per_stage: int, stream_bytes: float
) -> None:
    """Data that stays, collectives, and what goes from stage to stage."""
    members = {place["rank"]: place["groups"] for place in cut["ranks"]}
    for rank, layer, number in list(made):
        step: Step = made.nodes[rank, layer, number]["step"]
        before = (
            (rank, layer, number - 1) if number else (rank, layer - 1, _last(made, rank, layer))
        )
        if before in made:
            made.add_edge(before, (rank, layer, number))
        elif layer and layer % per_stage == 0 and not number and layer in layers:
            stages = members[rank]["pp"]
            sender = stages[stages.index(rank) - 1]
            last = max(node[2] for node in made if node[:2] == (sender, layer - 1))
            made.add_edge((sender, layer - 1, last), (rank, layer, 0), bytes=stream_bytes)
        if not step.axis:
            continue
        group = members[rank].get(step.axis) or members[rank]["tp"]
        for other in group:
            sender = (other, layer, number - 1) if number else (other, layer, "stored")
            if other == rank:
                continue
            if not number or step.operator.startswith("gathered"):
                sender = (other, layer, f"stored {step.operator}")
                if sender not in made:
                    column, row = made.nodes[rank, layer, number]["place"]
                    made.add_node(
                        sender,
                        label=step.operator.replace("gathered", "tile of")
                        if step.operator.startswith("gathered")
                        else f"stream, layer {layer}",
                        group=made.nodes[other, layer, number]["group"],
                        place=(column - 0.5, other + 0.3),
                    )
            made.add_edge(
                sender, (rank, layer, number), bytes=step.sent_bytes / max(1, len(group) - 1)
            )


def _last(made: nx.DiGraph, rank: int, layer: int) -> int:
    numbers = [node[2] for node in made if node[:2] == (rank, layer - 1) and type(node[2]) is int]
    return max(numbers, default=-1)

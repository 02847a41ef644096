"""The deployment of a layout as a graph: operators on devices, collectives as edges with bytes.

One micro-batch's forward pass. A node is an operator on a rank; an edge within a rank is data that
stays, an edge between ranks is what one sends the other, in bytes. A collective of p ranks in which
each sends S bytes is S / (p - 1) bytes from each to each other, a ring S to the next. The bytes are
the closed forms of :mod:`megatron_helix.exchange.traffic` and of the planner, one collective at a
time. FSDP gathers a layer at once, drawn at its first operator; what Megatron FSDP gathers once a
step, outside the layers, is not drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange import traffic
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run
from megatron_helix.planner import context, fsdp, model_ends, parameters
from megatron_helix.planner.book import Book
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.parameters import Shapes
from megatron_helix.verification import expectation

_SCORE_BYTES = 4  # scores are summed in fp32


@dataclass(frozen=True)
class Step:
    """An operator of a rank, and what other ranks send for it.

    Attributes:
        operator: its name.
        axis: group whose ranks send to each other; "" where the input is on the rank already.
        sent_bytes: by this rank, to all others of the axis together.
        ring: whether they pass it on, each to the next one.
        tile: a weight whose tiles or shards are gathered for it; "" for none.
        tile_bytes: sent by each rank for that, to all others together.
        tile_axis: the ranks that have them.
    """

    operator: str
    axis: str = ""
    sent_bytes: float = 0.0
    ring: bool = False
    tile: str = ""
    tile_bytes: float = 0.0
    tile_axis: str = "dim"


def build(
    experiment: ExperimentConfig,
    *,
    model: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
) -> nx.DiGraph:
    """The graph of one model and layout.

    Args:
        experiment: names them.
        model: by default the first.
        layout: by default the first helix one.
        layers: how many to draw from the first one; None for all.

    Raises:
        UserError: for a name that the experiment does not have, or a layout that cannot run.
    """
    helix = [item.name for item in experiment.layouts if item.is_helix]
    run = Run(
        model=_named("--model", experiment.models, model),
        layout=_named("--layout", experiment.layouts, layout or next(iter(helix), None)),
        phase="train",
        precision=experiment.precision,
    )
    here = expectation.deployment(experiment, run).check()
    places = {place["rank"]: place for place in expectation.describe(experiment, run)["ranks"]}
    for rank, place in places.items():
        place["groups"] |= _beside(here, rank)
    made = nx.DiGraph()
    chains = {
        rank: _chain(made, here, place, here.element_bytes, layers or run.model.num_layers)
        for rank, place in places.items()
    }
    for rank, chain in chains.items():
        for number, node in enumerate(chain):
            _connect(made, places[rank], chains, number, node)
        if places[rank]["stage"] and chain:
            sender = _stage_before(places[rank])
            chunk = _chunk(here) * here.element_bytes
            made.add_edge(chains[sender][-1], chain[0], bytes=chunk)
    if not nx.is_directed_acyclic_graph(made):
        raise RuntimeError(f"the deployment of {run.name} has a cycle")
    return made


def _named(flag: str, items: Sequence[Any], name: str | None) -> Any:
    if name is None:
        return items[0]
    found = [item for item in items if item.name == name]
    if not found:
        names = ", ".join(item.name for item in items)
        raise UserError(f"{flag}: must be one of {names}, got {name!r}")
    return found[0]


def _beside(here: Deployment, rank: int) -> dict[str, list[int]]:
    """The groups of a rank beside those of its layers: they share out sequences or weights."""
    groups = {}
    for axis in ("cp", "gtp", "dp", "expert_dp"):
        ranks, stride = Book(here).groups[axis]
        first = rank - rank // stride % ranks * stride
        groups[axis] = [first + place * stride for place in range(ranks)]
    return groups


def _stage_before(place: dict[str, Any]) -> int:
    stages = place["groups"]["pp"]
    return stages[stages.index(place["rank"]) - 1]


def _chunk(here: Deployment) -> float:
    """Elements of a rank's share of the stream of one micro-batch."""
    return here.tokens * here.model.hidden_size / here.tp


def layer_steps(here: Deployment, element: int) -> list[Step]:
    """The operators of one layer, in order; ``element`` bytes an element."""
    model, T, m = here.model, here.tp, here.layout.m or 1
    exchange, split = (here.plan.exchange, here.plan.split) if m > 1 else ("none", "none")
    gathers = exchange == "weights"
    axis, ranks = ("head", here.layout.n or 1) if gathers else ("tp", T)
    stream = (ranks - 1) * _chunk(here) * here.element_bytes
    D, d, H, K = model.hidden_size, model.kv_channels, model.num_attention_heads, model.query_groups
    tokens, stored, gtp = here.tokens, here.cut.padded_channels, here.layout.gtp

    def tile(name: str, elements: float) -> dict[str, Any]:
        if gtp > 1:
            sent = (gtp - 1) * elements / T / gtp * element
            return {"tile": name, "tile_bytes": sent, "tile_axis": "gtp"}
        sent = (m - 1) * elements / T * element
        return {"tile": name, "tile_bytes": sent} if gathers else {}

    def swapped(channels: int) -> float:
        moves = exchange == "activations"
        return (m - 1) / m * tokens * channels / T * element if moves else 0.0

    into_attention = swapped((H + 2 * K) * stored)
    if split == "sequence":
        into_attention += (m - 1) * tokens * 2 * K * d / T * element
    if exchange == "scores":
        heads, sequence = H // (here.layout.n or 1), here.batch.sequence_length
        summed = here.layout.micro_batch * heads * sequence**2
        into_attention += 2 * (m - 1) / m * summed * _SCORE_BYTES
    attention = Step("attention", "dim" if into_attention else "", into_attention)
    projection = Step(
        "output projection",
        "dim" if exchange == "activations" else "",
        swapped(H * stored),
        **tile("W_O", H * stored * D),
    )
    if here.layout.cp > 1:
        attention, projection = _over_contexts(here, projection)
    layer, experts = fsdp.layer_units(here) if here.layout.fsdp else ([], [])
    gathered = tile("W_QKV", (H + 2 * K) * stored * D) or _shards(here, "the layer", "dp", layer)
    steps = [
        Step("QKV projection", axis, stream, **gathered),
        attention,
        projection,
        Step("add and norm", axis, stream),
    ]
    if model.num_experts:
        ep = here.layout.ep
        routed = (ep - 1) / ep * _chunk(here) * model.moe_router_topk * element
        return [
            *steps,
            Step("router"),
            Step(
                "experts",
                "ep" if ep > 1 else "",
                routed,
                **_shards(here, "the experts", "expert_dp", experts),
            ),
            Step("combine", "ep" if ep > 1 else "", routed),
        ]
    F, gated = here.features, 2 if model.gated else 1
    return [
        *steps,
        Step("MLP up", axis, stream, **tile("W_1", gated * F * D)),
        Step("MLP down", **tile("W_2", F * D)),
        Step("add", axis, stream),
    ]


def _over_contexts(here: Deployment, projection: Step) -> tuple[Step, Step]:
    """Attention over context-parallel ranks, and the output projection behind it."""
    kind = here.layout.cp_comm_type or "p2p"
    book = Book(here)
    context.parallel(book)
    times = here.layers * here.microbatches
    sent = {
        moved.what: moved.sent_bytes / times for moved in book.entries if moved.when == "forward"
    }
    keys, heads = sent["keys and values"], sent.get("queries, context", 0.0)
    if kind != "a2a":
        return Step("attention", "cp", keys, ring=kind == "p2p"), projection
    back = replace(projection, axis="cp", sent_bytes=heads / 2)
    return Step("attention", "cp", keys + heads / 2), back


def _shards(here: Deployment, of: str, axis: str, shapes: Shapes) -> dict[str, Any]:
    """What FSDP gathers of a unit of these shapes."""
    ranks, _ = Book(here).groups[axis]
    if not shapes or ranks == 1:
        return {}
    sent = (ranks - 1) * fsdp.shard_size(here, shapes, ranks) * here.element_bytes
    return {"tile": f"the weights of {of}", "tile_bytes": sent, "tile_axis": axis}


def _of_end(here: Deployment, of: str, shapes: Shapes) -> dict[str, Any]:
    """What is gathered of the embedding or the head: all of FSDP2's unit there, GTP's table."""
    if here.layout.fsdp == "torch_fsdp2":  # which has no stages
        return _shards(here, of, "dp", shapes)
    if here.layout.gtp == 1:
        return {}
    sent = (here.layout.gtp - 1) * math.prod(parameters.table(here)) * here.element_bytes
    return {"tile": f"the weights of {of}", "tile_bytes": sent, "tile_axis": "gtp"}


def _token_order(here: Deployment, rank: int, element: int) -> tuple[Step, str]:
    """The conversion of the stream at either end of the block, by ``rank`` of T."""
    size = {"sequence": here.sequence, "batch": here.layout.micro_batch}
    ends = traffic.block_ends(here.plan, here.cut, here.block, **size, rank=rank)
    return Step("token order", "dim", ends.total() / 2 * element), ""


def _chain(
    made: nx.DiGraph, here: Deployment, place: dict[str, Any], element: int, shown: int
) -> list[Any]:
    """Add the operators of one rank; its nodes in order, of the layers that are shown."""
    per_stage = here.model.num_layers // here.stages
    first = place["stage"] * per_stage
    layers = range(first, min(first + per_stage, shown))
    if not layers:
        return []
    steps = layer_steps(here, element)
    order = _token_order(here, place["tensor_rank"], element)
    before, after = parameters.end_shapes(here, True, True)
    table = {} if place["stage"] else _of_end(here, "the embedding", before)
    named = [(Step("received" if place["stage"] else "embedding", **table), "")]
    named += [order] * model_ends.converts(here, first=not first, last=False)
    named += [(step, f", layer {layer}") for layer in layers for step in steps]
    last = layers[-1] == here.model.num_layers - 1
    named += [order] * model_ends.converts(here, first=False, last=last)
    if last and (head := _of_end(here, "the LM head", after)):
        named += [(Step("LM head", **head), "")]
    tile = f", tile {place['head_group']},{place['segment']}" if "segment" in place else ""
    column = first * len(steps) + 2 * place["stage"]
    chain = []
    for number, (step, layer) in enumerate(named):
        node = (place["rank"], column + number)
        made.add_node(
            node,
            label=f"{step.operator}{layer}",
            group=f"rank {place['rank']}{tile}",
            place=(column + number, place["rank"]),
            step=step,
        )
        chain.append(node)
    return chain


def _connect(
    made: nx.DiGraph, place: dict[str, Any], chains: dict[int, list[Any]], number: int, node: Any
) -> None:
    """Edges into a node: from the operator before it, on this rank and on those that send."""
    step: Step = made.nodes[node]["step"]
    if number:
        made.add_edge(chains[place["rank"]][number - 1], node)
    if step.axis:
        group = place["groups"][step.axis]
        before = group[group.index(place["rank"]) - 1]
        for other in [before] if step.ring else group:
            if other != place["rank"]:
                theirs = made.nodes[chains[other][number]]["step"].sent_bytes
                sent = theirs / (1 if step.ring else len(group) - 1)
                made.add_edge(chains[other][number - 1], node, bytes=sent, axis=step.axis)
    if step.tile:
        group = place["groups"][step.tile_axis]
        for other in group:
            tile = _tile(made, chains[other][number], step)
            sent = step.tile_bytes / (len(group) - 1)
            apart = {} if other == place["rank"] else {"bytes": sent, "axis": step.tile_axis}
            made.add_edge(tile, node, **apart)


def _tile(made: nx.DiGraph, user: Any, step: Step) -> Any:
    """The node of a stored tile or shard, beside the operator of its own rank that uses it."""
    tile = (*user, step.tile)
    if tile not in made:
        column, row = made.nodes[user]["place"]
        group = made.nodes[user]["group"]
        label = f"own {'tile' if step.tile_axis == 'dim' else 'shard'} of {step.tile}"
        made.add_node(tile, label=label, group=group, place=(column - 0.55, row + 0.4))
    return tile

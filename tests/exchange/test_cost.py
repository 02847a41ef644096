"""What plans cost in time: what decides between them, one thing at a time."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_helix.exchange import pieces, tokens, traffic
from megatron_helix.exchange.cost import layer_seconds, moves, of_prefixes, summed_bytes
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice, explain, resolve
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.machine.hardware import BESIDE, Hardware
from megatron_helix.machine.hopper import HOPPER, of_card
from megatron_helix.partition.layout import HelixLayout

LAYOUT = HelixLayout(m=4, n=2, num_attention_heads=16, num_query_groups=16, kv_channels=128)
SHAPE = BlockShape(hidden=2048, ffn=8192, gated=False, num_layers=4)
SIZE = {"sequence": 4096, "batch": 4}
PLANS = [
    Plan(exchange=exchange, split=split, gather=gather)
    for exchange, gather in (
        ("activations", "microbatch"),
        ("weights", "microbatch"),
        ("weights", "once"),
        ("weights", "step"),
    )
    for split in ("batch", "sequence")
]


def machine(**figures: float) -> Hardware:
    """Hopper with other figures: ``latency`` in us, ``bandwidth`` in GB/s, and what is hidden.

    By the name of what moves; nothing else is hidden, and ranks come together.
    """
    changed: dict[str, Any] = HOPPER.model_dump(mode="json") | {"arrival": None}
    hidden = {name: figures.pop(name) for name in BESIDE if name in figures}
    changed["beside"] = {
        name: {"hidden": part, "slowed": 0.25, "source": "a test"} for name, part in hidden.items()
    }
    for name, value in figures.items():
        changed["intra_node"][name]["value"] = value
    return Hardware.model_validate(changed)


def seconds(plan: Plan, here: Hardware, **more: int) -> float:
    return layer_seconds(plan, LAYOUT, SHAPE, here, **{**SIZE, **more})


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_on_slow_links_time_is_bytes(plan: Plan) -> None:
    slow = machine(bandwidth=0.001, latency=1e-6)
    size = {**SIZE, "microbatches": 2}
    sent = traffic.per_layer(plan, LAYOUT, SHAPE, **size) * slow.element_bytes
    expected = sent / slow.intra_node.bandwidth.rate
    assert seconds(plan, slow, microbatches=2) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("moved", ["weights", "gradients", "tokens"])
def test_what_is_begun_early_costs_what_a_gemm_does_not_hide(moved: str) -> None:
    """Less what the GEMM loses by it; and of one kind of what moves, not of the others."""
    here, all_seen = machine(**{moved: 0.8}), machine()
    tokens, weights = PLANS[0], PLANS[2]
    for plan in (tokens, weights):
        forward, backward = traffic.layer(plan, LAYOUT, SHAPE, **SIZE)
        early = traffic.begun_early(plan, LAYOUT, SHAPE, **SIZE)
        gained = 0.0
        calls = traffic.calls(plan, SHAPE)
        groups = {"tp": (8, 1), "head": (2, 4), "dim": (4, 1)}
        for when, elements, beside in zip(
            ("forward", "backward"), (forward, backward), early, strict=True
        ):
            for (axis, kind), share in beside.items():
                if moves(axis, kind) != moved:
                    continue
                count = elements[axis, kind] * here.element_bytes
                known = (kind, count, calls[when, axis, kind], *groups[axis])
                gained += share * 0.8 * (1 - 0.25) * here.seconds(*known)
        assert (gained > 0) == (moved == "tokens" or plan is weights)
        assert seconds(plan, all_seen) - seconds(plan, here) == pytest.approx(gained)


def test_calls_cost_their_latency() -> None:
    plan = Plan(exchange="activations", split="batch")
    late = seconds(plan, machine(latency=100.0)) - seconds(plan, machine(latency=50.0))
    tp = 3 * (2 + 4 + 2 + 2)  # log2 of 8 hops each: gathers and scatters of four linears
    assert late == pytest.approx((tp + 2 * 2) * 50e-6)


def test_the_rank_with_most_causal_work_is_waited_for() -> None:
    fast = machine(bandwidth=1e9, latency=1e-9)
    even = Plan(exchange="activations", split="sequence")
    uneven = replace(even, balanced=False)
    assert fast.fused_attention is not None
    attention = 3 * 2 * 4 * 4096**2 * 2048 / 8 / fast.fused_attention.rate
    waited = seconds(uneven, fast) - seconds(even, fast)
    assert waited == pytest.approx(attention * 3 / 8, rel=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("core", ["spec", "prefix", "ffpa", "auto"])
@pytest.mark.parametrize("channels", [128, 512])
def test_a_sequence_split_costs_what_its_pieces_are_more_or_less_than_a_batch_split(
    channels: int, core: str, training: bool
) -> None:
    """Fused, the rectangles of their prefixes; unfused, these instead of the square.

    And where pieces are called one by one, the sums of their gradients of keys and values. The
    layer spec's fused kernels, in training, attend gap by gap and merge instead.
    """
    fast = machine(bandwidth=1e9, latency=1e-9)
    assert fast.fused_attention is not None
    wide = HelixLayout(m=4, n=2, num_attention_heads=16, num_query_groups=16, kv_channels=channels)
    by_batch, by_sequence = (
        layer_seconds(
            Plan(exchange="activations", split=split),
            *(wide, SHAPE, fast),
            **SIZE,
            training=training,
            core_attention=core,
        )
        for split in ("batch", "sequence")
    )
    passes = 3 if training else 1
    pairs = passes * 4 * 4096**2 * 16 / 8  # of queries and keys, sixteen heads on eight ranks
    fused = core != "prefix" and (channels == 128 or core == "ffpa")
    if core == "prefix" or (core == "auto" and not fused):
        expected = 0.0
    elif fused:  # two products of 17/32 of them, not of the half
        expected = 4 * pairs * channels / 32 / fast.fused_attention.rate
    else:
        products = 4 * pairs * channels / fast.gemm.rate
        scores = 4 * pairs * 2 / fast.streaming_rate
        expected = -(products + scores) * 15 / 32
    if training and fused and core in ("spec", "auto"):
        # Four runs of a rank: behind the mean gap are 5/8 of its queries.
        elements = 4 * 4096 * 16 * channels / 8
        expected = elements * 4 * 5 / 8 * 6 * 2 / fast.streaming_rate
    elif training and expected:
        keys = 2 * 4 * 4096 * 8 * channels  # and values, of a head group
        # Four pieces of 17/32 in the mean: a gradient in half precision read, sums read, written.
        expected += keys * (4 + 4 * 17 / 32 * 10 + 6) / fast.streaming_rate
    assert by_sequence - by_batch == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_no_more_is_hidden_than_there_is_to_compute() -> None:
    """Few tokens hide nothing of the weights, many all that a GEMM can hide."""
    here, seen = machine(weights=0.8, latency=1e-6), machine(latency=1e-6)
    here = here.model_copy(update={"gap": None})
    plan = Plan(exchange="weights", split="sequence")

    def hidden(sequence: int) -> float:
        size = {"sequence": sequence, "batch": 1}
        return seconds(plan, seen, **size) - seconds(plan, here, **size)

    assert 0 < hidden(8) < 2 * hidden(8) < hidden(4096)
    assert hidden(4096) == pytest.approx(hidden(16384))


def test_without_a_backward_pass_only_the_forward_pass_counts() -> None:
    here = machine(bandwidth=0.001, latency=1e-6)
    for plan in PLANS[:4]:
        forward, _ = traffic.layer(plan, LAYOUT, SHAPE, **SIZE)
        ends = traffic.training_ends(plan, LAYOUT, SHAPE, **SIZE).total() / SHAPE.num_layers
        sent = forward.total() + ends
        assert traffic.per_layer(plan, LAYOUT, SHAPE, **SIZE, training=False) == sent
        expected = sent * here.element_bytes / here.intra_node.bandwidth.rate
        assert seconds(plan, here, training=False) == pytest.approx(expected, rel=1e-4)


def test_auto_takes_the_least_time() -> None:
    """Few tokens move as tokens, many leave their place to weights; latency moves the border."""
    size = {"sequence": 4096, "sequence_parallel": True}
    here = of_card("NVIDIA H200", 8)
    assert here is not None
    for batch in (4, 8, 32, 128):
        asked = Choice(machine=here)
        taken = resolve(asked, LAYOUT, SHAPE, batch=batch, **size)
        assert taken.exchange in ("activations", "weights")
        every = [
            resolve(
                replace(asked, exchange=exchange, split=split), LAYOUT, SHAPE, batch=batch, **size
            )
            for exchange in ("activations", "weights")
            for split in ("batch", "sequence")
        ]
        cost = {"sequence": 4096, "batch": batch}
        least = min(layer_seconds(plan, LAYOUT, SHAPE, here, **cost) for plan in every)
        assert layer_seconds(taken, LAYOUT, SHAPE, here, **cost) == least
    exchanges = [
        resolve(Choice(machine=here), LAYOUT, SHAPE, batch=batch, **size).exchange
        for batch in (4, 512)
    ]
    assert exchanges[1] == "weights"
    words = explain(taken, asked, LAYOUT, SHAPE, sequence=4096, batch=128)
    unit = "ms of communication and core attention a layer and micro-batch"
    assert f"{unit} (predicted): activations" in words
    assert "--helix-gather" not in words


def test_what_other_gatherings_would_save_is_said() -> None:
    """Where there are several micro-batches to share what is gathered; it takes memory."""
    here = of_card("NVIDIA H200", 8)
    size = {"sequence": 4096, "batch": 128}
    for machine in (here, None):
        asked = Choice(machine=machine, microbatches=8)
        plan = resolve(asked, LAYOUT, SHAPE, **size, sequence_parallel=True)
        words = explain(plan, asked, LAYOUT, SHAPE, **size)
        said = r"weights ([\d.,]+), weights by --helix-gather once ([\d.,]+), .* step ([\d.,]+)"
        found = re.search(said, words)
        assert found
        costs = [float(figure.rstrip(",").replace(",", "")) for figure in found.groups()]
        assert costs == sorted(costs, reverse=True)
        assert costs[0] > costs[2]


@pytest.mark.parametrize("here", [None, machine()], ids=["bytes", "seconds"])
def test_layers_that_gather_anew_count_for_what_they_are(here: Hardware | None) -> None:
    """What is compared is the mean of a chunk's layers: of both stages' first of four here."""
    asked = Choice(exchange="weights", split="batch", gather="once", microbatches=4, machine=here)
    size = {"sequence": 4096, "batch": 128}

    def said(choice: Choice) -> tuple[float, float]:
        plan = resolve(choice, LAYOUT, SHAPE, **size, sequence_parallel=True)
        words = explain(plan, choice, LAYOUT, SHAPE, **size)
        layers = " --helix-gather-layers 1" if choice.gather_layers else ""
        found = re.search(rf"weights ([\d.,]+), .*-gather once{layers} ([\d.,]+),", words)
        assert found
        return tuple(float(figure.rstrip(",").replace(",", "")) for figure in found.groups())

    anew, kept = said(asked)
    some = said(replace(asked, gather_layers=1, chunks=2))
    assert some == (anew, pytest.approx((anew + kept) / 2, rel=1e-3))
    assert kept < some[1] < anew


def test_only_cards_that_are_known_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_card("NVIDIA A100-SXM4-80GB", 8) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    here = of_card("NVIDIA H100 80GB HBM3", 16)
    assert here is not None
    assert (here.devices, here.devices_per_node) == (16, 4)
    # Between nodes a collective goes at the pace of the link that leaves them.
    assert here.seconds("all_gather", 1e9, 1, 16, 1) > here.seconds("all_gather", 1e9, 1, 4, 1)


@pytest.mark.parametrize(("m", "n", "sequence"), [(2, 1, 32768), (4, 2, 4096), (3, 2, 49152)])
def test_rectangles_are_those_of_the_calls(m: int, n: int, sequence: int) -> None:
    """Of a sequence split, long pieces cut: queries times the keys up to their end."""
    layout = replace(LAYOUT, m=m, n=n)
    calls = [
        call
        for segment in range(m)
        for piece in pieces.pieces(layout, segment, sequence)
        for call in tokens.in_calls(piece)
    ]
    pairs = sum(call.length * call.end for call in calls)
    assert of_prefixes(layout, sequence, "spec") == pytest.approx(pairs / sequence**2)
    each = sum(call.end for call in calls) / sequence / m
    assert summed_bytes(layout, sequence, "spec", 2) == pytest.approx(4 + each * 10 + 6)

"""What a plan costs a layer in time, on a machine that is described.

Every plan multiplies as much, so what is counted is what they do not have in common: the time of
collectives, as far as nothing hides it; the work of the rank that has most of it; and the copies of
weights that are put in order. What a collective costs is
:meth:`megatron_helix.machine.hardware.Hardware.held`: one that is begun early runs beside a GEMM,
and how much of it that hides is a property of what moves; one whose result the next operation waits
for is all seen.
"""

from megatron_helix.exchange import traffic
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.machine.hardware import Beside, Hardware
from megatron_helix.partition.layout import HelixLayout


def layer_seconds(
    plan: Plan,
    layout: HelixLayout,
    shape: BlockShape,
    machine: Hardware,
    *,
    sequence: int,
    batch: int,
    microbatches: int = 1,
    training: bool = True,
) -> float:
    """Seconds of a layer and micro-batch, on the rank that takes longest.

    Args:
        plan: what runs.
        layout: the cut.
        shape: of the decoder block.
        machine: rates, links, and what runs beside a GEMM.
        sequence: s, in tokens.
        batch: b, sequences of the micro-batch.
        microbatches: that share what is gathered once a step.
        training: whether a backward pass follows.
    """
    size = {"sequence": sequence, "batch": batch}
    directions = traffic.layer(plan, layout, shape, **size)
    early = traffic.begun_early(plan, layout, shape, **size)
    calls = traffic.calls(plan, shape)
    groups = {"tp": (layout.size, 1), "head": (layout.n, layout.m), "dim": (layout.m, 1)}
    total = 0.0
    for when, elements, beside in zip(("forward", "backward"), directions, early, strict=True):
        for (axis, kind), count in elements.items():
            if when == "backward" and not training:
                continue
            width = 4 if plan.exchange == "scores" and axis == "dim" else machine.element_bytes
            number = calls.get((when, axis, kind), 1)
            share = beside.get((axis, kind), 0.0)
            sent, ranks = count * width, groups[axis]
            kept = plan.keeps_weights if kind == "all_gather" else plan.keeps_gradients
            if kept and axis == "dim":  # weights come once a step, and nothing hides them then
                seconds = machine.held(kind, sent, number, *ranks).lost
                total += seconds * (1 - share * (1 - 1 / microbatches))
                continue
            ahead, rest = ((part * sent, part * number) for part in (share, 1 - share))
            total += machine.held(kind, *ahead, *ranks, beside=moves(axis, kind)).lost
            total += machine.held(kind, *rest, *ranks).lost
    converted = traffic.training_ends if training else traffic.block_ends
    for (axis, kind), count in converted(plan, layout, shape, **size).items():
        sent = count * machine.element_bytes
        seconds = machine.held(kind, sent, 2, *groups[axis]).lost * (2 if training else 1)
        total += seconds / shape.num_layers
    passes = 3 if training else 1
    fused = layout.kv_channels <= machine.fused_attention_max_channels
    rate = ((machine.fused_attention if fused else None) or machine.gemm).rate
    attention = _attention(layout, **size) * passes / rate
    total += attention * (_computed(plan, layout, fused=fused) - 1)
    if plan.exchange == "weights":
        # What was gathered is put in order, and so is its gradient: written once and read once.
        gathers = (passes - training) / (microbatches if plan.keeps_weights else 1)
        gradients = training / (microbatches if plan.keeps_gradients else 1)
        moved = 2 * (gathers + gradients) * shape.weights(layout) / layout.n
        total += moved * machine.element_bytes / machine.streaming_rate
    return total


def moves(axis: str, kind: str) -> Beside:
    """What is begun early on an axis of a layer (:func:`traffic.begun_early`)."""
    if axis != "dim":
        return "tokens"
    return "weights" if kind == "all_gather" else "gradients"


def _attention(layout: HelixLayout, *, sequence: int, batch: int) -> float:
    """Operations of a rank in causal core attention, forward: half of ``4 b s^2 H d / T``."""
    channels = layout.num_attention_heads * layout.kv_channels
    return 2 * batch * sequence**2 * channels / layout.size


def _computed(plan: Plan, layout: HelixLayout, *, fused: bool) -> float:
    """What attention takes on the rank with most of it, over what it takes with a batch split.

    Under a sequence split a piece, one of 2T, costs a fused kernel the rectangle of its prefix
    (:mod:`megatron_helix.exchange.tokens`). Unfused, other splits compute no less.
    """
    if plan.split != "sequence":
        return 1.0
    waits = 0.0 if plan.balanced else (layout.m - 1) / layout.size
    return 1 + waits + (1 / (2 * layout.size) if fused else 0.0)

"""What a plan costs a layer in time, on a machine that is described.

Every plan multiplies as much, so what is counted is what they do not have in common: the time of
collectives, as far as nothing hides it; core attention of the rank that has most of it; and what is
read and written to put in order, or to add up, what moves. What a collective costs is
:meth:`megatron_helix.machine.hardware.Hardware.held`: one that is begun early runs beside a GEMM,
and how much of it that hides is a property of what moves, but never more than there is to compute;
one whose result the next operation waits for is all seen. The planner's predictions have the same
terms among others, and a test holds what ``auto`` takes against them.
"""

from megatron_helix.exchange import dealing, traffic
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.machine.hardware import Beside, Hardware, Held
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.run_config.core_attention import OWN

FP32 = 4
# Channels of a head up to which TransformerEngine's fused kernels attend gap by gap.
IN_PARTS = 256
KERNELS = {"forward": 25, "backward": 45}  # of a layer, as TransformerEngine has it


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
    serving: bool = False,
    core_attention: str = "spec",
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
        serving: whether the stream enters and leaves the block as stock has it, where a training
            loop puts word ids and losses in order.
        core_attention: a value of ``--helix-core-attention``.
    """
    size = {"sequence": sequence, "batch": batch}
    passes = 3 if training else 1
    attention = _attention(plan, layout, machine, core_attention, **size, training=training)
    products = 2 * sequence * batch * shape.weights(layout) / layout.size
    computed = passes * products / machine.gemm.rate + attention
    if machine.gap:
        kernels = KERNELS["forward"] + training * KERNELS["backward"]
        computed += kernels * machine.gap.rate
    moved = _collectives(plan, layout, shape, machine, **size, microbatches=microbatches)
    held = Held(*(sum(each) for each in zip(*moved[: 2 if training else 1], strict=True)))
    fits = min(1.0, computed / held.hidden) if held.hidden else 1.0
    total = held.alone - fits * (held.hidden - held.slowed) + attention
    groups = _groups(layout)
    converted = traffic.block_ends if serving else traffic.training_ends
    for (axis, kind), count in converted(plan, layout, shape, **size).items():
        sent = count * machine.element_bytes
        seconds = machine.held(kind, sent, 2, *groups[axis]).lost * (2 if training else 1)
        total += seconds / shape.num_layers
    ordered = traffic.put_in_order(plan, layout, shape, **size, microbatches=microbatches)
    elements = sum(ordered) if training else ordered[0]
    if plan.exchange == "weights" and training:  # the parts of other ranks, added up
        elements += (layout.m - 1) * shape.weights(layout) / layout.size
    return total + elements * machine.element_bytes / machine.streaming_rate


def _groups(layout: HelixLayout) -> dict[str, tuple[int, int]]:
    """(ranks, stride) of the axes of a layer."""
    return {"tp": (layout.size, 1), "head": (layout.n, layout.m), "dim": (layout.m, 1)}


def _collectives(
    plan: Plan,
    layout: HelixLayout,
    shape: BlockShape,
    machine: Hardware,
    *,
    sequence: int,
    batch: int,
    microbatches: int,
) -> list[Held]:
    """What those of a layer cost, forward and backward."""
    size = {"sequence": sequence, "batch": batch}
    directions = traffic.layer(plan, layout, shape, **size)
    early = traffic.begun_early(plan, layout, shape, **size)
    calls, groups = traffic.calls(plan, shape), _groups(layout)
    found = []
    for when, elements, beside in zip(("forward", "backward"), directions, early, strict=True):
        parts = []
        for (axis, kind), count in elements.items():
            width = FP32 if plan.exchange == "scores" and axis == "dim" else machine.element_bytes
            number = calls.get((when, axis, kind), 0)
            share = beside.get((axis, kind), 0.0)
            sent, ranks = count * width, groups[axis]
            ahead, rest = ((part * sent, part * number) for part in (share, 1 - share))
            kept = plan.keeps_weights if kind == "all_gather" else plan.keeps_gradients
            if kept and axis == "dim":  # of a step, and the calls are of keys and values alone
                ahead = ahead[0] / microbatches, shape.gathered / microbatches
                rest = rest[0], number
            parts.append(machine.held(kind, *ahead, *ranks, beside=moves(axis, kind)))
            parts.append(machine.held(kind, *rest, *ranks))
        found.append(Held(*(sum(each) for each in zip(*parts, strict=True))))
    return found


def moves(axis: str, kind: str) -> Beside:
    """What is begun early on an axis of a layer (:func:`traffic.begun_early`)."""
    if axis != "dim":
        return "tokens"
    return "weights" if kind == "all_gather" else "gradients"


def _attention(
    plan: Plan,
    layout: HelixLayout,
    machine: Hardware,
    core: str,
    *,
    sequence: int,
    batch: int,
    training: bool,
) -> float:
    """Seconds of core attention on the rank with most of it.

    Operations of all scores are ``4 b s^2 H d / T`` forward. A fused kernel does those below the
    diagonal; under a sequence split the layer spec's does so gap by gap in training, and merges
    parts (:func:`by_gaps`). Others are called for each piece, one of 2T, which costs the rectangle
    of its prefix, and a long one a rectangle a call (:mod:`megatron_helix.exchange.tokens`), and
    the gradients of keys and values are added up. Unfused, a batch split does all of them, and the
    scores pass through memory; a sequence split those of its prefixes. ``prefix`` does as
    much under either split.
    """
    size, by_sequence = layout.size, plan.split == "sequence"
    fused = layout.kv_channels <= machine.fused_attention_max_channels or (
        core in OWN and OWN[core].fused
    )
    prefix = core == "prefix" or (core == "auto" and not fused)
    fused &= not prefix and plan.exchange != "scores"
    pairs = batch * sequence**2 * layout.num_attention_heads / size * (3 if training else 1)
    flops = 4 * pairs * layout.kv_channels
    waits = 0.0 if plan.balanced or not by_sequence else (layout.m - 1) / size / 2
    apart = by_sequence and training and by_gaps(core, layout.kv_channels, fused=fused)
    at_once = prefix or apart  # no more than what is causal
    share = 0.5 if fused or prefix else 1.0
    if by_sequence and not at_once:
        share = of_prefixes(layout, sequence, core)
    if fused:
        taken = flops / (machine.fused_attention or machine.gemm).rate
    else:
        scores = 4 * pairs * machine.element_bytes
        taken = flops / machine.gemm.rate + scores / machine.streaming_rate
    taken *= share + waits
    if by_sequence and training and not at_once:
        keys = 2 * batch * sequence * layout.num_query_groups / layout.n * layout.kv_channels
        width = machine.element_bytes
        taken += keys * summed_bytes(layout, sequence, core, width) / machine.streaming_rate
    if apart:
        rows = batch * sequence * layout.num_attention_heads * layout.kv_channels / size
        taken += rows * merged_bytes(layout, machine.element_bytes) / machine.streaming_rate
    return taken


def by_gaps(core: str, channels: int, *, fused: bool) -> bool:
    """Whether tokens of a sequence split attend gap by gap (:mod:`megatron_helix.exchange.gaps`).

    As TransformerEngine's fused kernels do it in training, by whose name they are asked for.
    """
    return fused and core in ("spec", "auto") and channels <= IN_PARTS


def merged_bytes(layout: HelixLayout, width: int) -> float:
    """Read and written an element of the output to merge what is seen gap by gap, in training.

    A call reads two outputs and writes one, and its backward pass as many gradients of queries; of
    n chunks the mean call is that of half the queries, and of two ranks there is one a chunk.
    """
    calls = (layout.n + 1) / 2 if layout.m == 2 else (2 * layout.n + 1) / 2
    return 6 * width * calls


def calls(layout: HelixLayout, sequence: int, core: str) -> int:
    """Of a piece, as :func:`megatron_helix.exchange.tokens.in_calls` cuts it."""
    skips = core in OWN and OWN[core].skips
    return 1 if skips else -(-sequence // (2 * layout.size * dealing.QUERIES))


def of_prefixes(layout: HelixLayout, sequence: int, core: str) -> float:
    """Of all pairs of queries and keys, those in the rectangles of a sequence split's calls."""
    parts = 2 * layout.size * calls(layout, sequence, core)
    return (parts + 1) / (2 * parts)


def summed_bytes(layout: HelixLayout, sequence: int, core: str, width: int) -> float:
    """Read and written a key or value to add up gradients of a rank's calls, each of its prefix.

    Zeros; a call's gradient is read, the sum read and written; the sum is read, and rounded.
    """
    each = 2 * layout.n * calls(layout, sequence, core)
    prefixes = each * of_prefixes(layout, sequence, core)
    return FP32 + prefixes * (width + 2 * FP32) + FP32 + width

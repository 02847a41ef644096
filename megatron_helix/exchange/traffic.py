"""What each exchange sends, in closed form: the byte model behind ``auto`` and the tests.

Counts are elements that one rank sends for one transformer layer (attention, and the MLP where it
is dense) of one micro-batch, by axis and kind of collective, with sequence parallelism and linears
without bias. N = s * b tokens, D hidden, F MLP features a projection, T = m * n, ``c = N D / T`` a
rank's chunk of the stream, ``X = (slots K + H) d`` channels of packed QKV and context, ``W = X D +
(2 or 3) F D`` the layer's weights. A collective's send count is that of
:mod:`megatron_helix.recording.comm_ledger`.

==================  ==============================  ==============================  ===============
axis, kind          activations                     weights                         scores
==================  ==============================  ==============================  ===============
tp all_gather       fwd 2 (T-1) c, bwd 4 (T-1) c                                    as activations
tp reduce_scatter   fwd 2 (T-1) c, bwd 2 (T-1) c                                    as activations
head all_gather                                     fwd 2 (n-1) c, bwd 4 (n-1) c
head reduce_scatter                                 fwd 2 (n-1) c, bwd 2 (n-1) c
dim all_to_all      fwd, bwd (m-1)/m N X / T        bwd (m-1) W / T
dim all_gather                                      fwd, bwd (m-1) W / T
dim all_reduce                                                                      fwd, bwd R
==================  ==============================  ==============================  ===============

with ``R = 2 (m-1)/m b H/n s^2`` in fp32. The first factor of the token terms counts linears: four
of them, two where the MLP is not dense (half of each figure). A sequence split adds the gathering
of keys and values over dim, fwd all_gather and bwd all_to_all of ``(m-1) N 2 K d / T`` each.
``weights`` converts the stream at the block's two ends: ``2 (m-1)/m c`` of dim all_to_all in all,
forward and as much backward. With a sequence split it does only where embedding or head cannot be
given their tokens in the block's order, and what a rank then sends is ``2 c`` without the pieces
that are its own already (:func:`block_ends`). With ``gather="step"`` the weight terms come once a
step: forward all_gather and, backward, sends. With ``gather="once"`` the forward all_gather
comes once a step, and the backward all_to_all with every micro-batch. A layer beyond those of
``--helix-gather-layers`` has the plan of ``gather="microbatch"``.
"""

from collections import Counter
from dataclasses import dataclass

from megatron_helix.exchange.pieces import kept
from megatron_helix.exchange.plan import Plan
from megatron_helix.partition.features import padded
from megatron_helix.partition.layout import HelixLayout

Elements = Counter[tuple[str, str]]
# A whole gradient is written, put in order, read and added to a sum in fp32: 16 bytes an element in
# half precision, where a factor of it is copied for 4.
COPIES = 4


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the closed forms need of a decoder block.

    Attributes:
        hidden: D.
        ffn: F of the dense MLP; 0 where the layers are MoE.
        gated: whether the MLP has a gate, a third weight.
        num_layers: layers of the whole block, which share the conversion at its ends.
    """

    hidden: int
    ffn: int
    gated: bool
    num_layers: int

    def weights(self, layout: HelixLayout) -> int:
        """Weights W of one layer's attention and dense MLP, with the features of all ranks."""
        ffn = padded(self.ffn, layout.size)
        return packed(layout) * self.hidden + (3 if self.gated else 2) * ffn * self.hidden

    @property
    def sublayers(self) -> int:
        """Pairs of linears: attention's, and a dense MLP's."""
        return 2 if self.ffn else 1

    @property
    def gathered(self) -> int:
        """Matrices of a layer that are gathered one by one: a gate and what it opens are two."""
        return 2 * self.sublayers + int(self.gated and self.ffn > 0)


def packed(layout: HelixLayout) -> int:
    """Channels X of packed QKV and context as they are stored and sent, ``(slots K + H) d``.

    With what pads smaller segments, where m does not cut d into equal ones.
    """
    heads = layout.slots * layout.num_query_groups + layout.num_attention_heads
    return heads * layout.padded_channels


def layer(
    plan: Plan, layout: HelixLayout, shape: BlockShape, *, sequence: int, batch: int
) -> tuple[Elements, Elements]:
    """(forward, backward) elements of one layer and micro-batch, by (axis, kind).

    What comes once a step, the gathering of weights in the forward pass and their gradients'
    reduction in the backward pass, stands in each micro-batch; :func:`per_layer` shares it out.
    """
    m, n, size = layout.m, layout.n, layout.size
    tokens = sequence * batch
    linears = shape.sublayers
    axis, ranks = ("head", n) if plan.exchange == "weights" else ("tp", size)
    chunk = (ranks - 1) * tokens * shape.hidden // size
    stream = {(axis, "all_gather"): linears * chunk, (axis, "reduce_scatter"): linears * chunk}
    forward, backward = Counter(stream), Counter(stream)
    backward[axis, "all_gather"] += linears * chunk  # the inputs of column linears, once more
    if plan.exchange == "activations":
        moved = (m - 1) * tokens * packed(layout) // (m * size)
        forward["dim", "all_to_all"] += moved
        backward["dim", "all_to_all"] += moved
    elif plan.exchange == "weights":
        moved = (m - 1) * shape.weights(layout) // size
        forward["dim", "all_gather"] += moved
        if not plan.keeps_weights:
            backward["dim", "all_gather"] += moved
        backward["dim", "send" if plan.keeps_gradients else "all_to_all"] += moved
    else:
        heads = layout.num_attention_heads // n
        summed = 2 * (m - 1) * batch * heads * sequence**2 // m
        forward["dim", "all_reduce"] += summed
        backward["dim", "all_reduce"] += summed
    if plan.split == "sequence":
        gathered = (m - 1) * tokens * 2 * layout.num_query_groups * layout.kv_channels // size
        forward["dim", "all_gather"] += gathered
        backward["dim", "all_to_all"] += gathered
    return forward, backward


def calls(plan: Plan, shape: BlockShape) -> dict[tuple[str, str, str], int]:
    """Calls of each collective of a layer by (direction, axis, kind)."""
    linears = shape.sublayers
    axis = "head" if plan.exchange == "weights" else "tp"
    weights = shape.gathered if plan.exchange == "weights" else 0
    gathers = 0 if plan.keeps_weights else weights
    sends = 0 if plan.keeps_gradients else weights
    extra = int(plan.split == "sequence")
    tokens = 2 if plan.exchange == "activations" else 0
    return {
        ("forward", axis, "all_gather"): linears,
        ("backward", axis, "all_gather"): 2 * linears,
        ("forward", axis, "reduce_scatter"): linears,
        ("backward", axis, "reduce_scatter"): linears,
        ("forward", "dim", "all_to_all"): tokens,
        ("backward", "dim", "all_to_all"): tokens + sends + extra,
        ("forward", "dim", "all_gather"): gathers + extra,
        ("backward", "dim", "all_gather"): gathers,
    }


def begun_early(
    plan: Plan, layout: HelixLayout, shape: BlockShape, *, sequence: int, batch: int
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """(forward, backward) part of :func:`layer`'s elements that move beside a GEMM on a GPU.

    The gathering of weights, begun while the linear before multiplies, and the exchange of their
    gradients (:mod:`megatron_helix.exchange.weights`). In a backward pass also the input that a
    column linear gathers again, beside the GEMM of its gradient, and the reduce-scatter of that,
    beside the weight gradient's, in Megatron's linears as in the gathered ones. What the next
    operation waits for is not in it: tokens on their way to a GEMM, keys and values.
    """
    axis = "head" if plan.exchange == "weights" else "tp"
    forward: dict[tuple[str, str], float] = {}
    backward = {(axis, "all_gather"): 0.5, (axis, "reduce_scatter"): 1.0}
    if plan.exchange == "weights":
        weights = (layout.m - 1) * shape.weights(layout) // layout.size
        both = weights
        if plan.split == "sequence":
            tokens = sequence * batch
            channels = 2 * layout.num_query_groups * layout.kv_channels
            both += (layout.m - 1) * tokens * channels // layout.size
        share = weights / both if both else 0.0
        forward["dim", "all_gather"] = share
        if not plan.keeps_weights:
            backward["dim", "all_gather"] = 1.0
        if plan.keeps_gradients:
            backward["dim", "send"] = 1.0  # the all-to-all is of keys and values alone
        else:
            backward["dim", "all_to_all"] = share
    return forward, backward


def put_in_order(
    plan: Plan,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    microbatches: int = 1,
) -> tuple[float, float]:
    """(forward, backward) elements of a layer that are read and written where order is not kept.

    ``activations``: packed QKV and the context, before and after their all-to-all, in either pass.
    ``weights``: the gathered weights of attention, whose shards are cut in every head, after each
    gather, and their gradients before they go home; an MLP's lie in order. What is kept for a step
    is put in order once for its ``microbatches``; of gradients that are, a factor is, or the whole
    where that is less.
    """
    if plan.exchange == "activations":
        tokens = 4 * sequence * batch * packed(layout) / layout.size
        return tokens, tokens
    if plan.exchange != "weights":
        return 0.0, 0.0
    whole = 2 * packed(layout) * shape.hidden / layout.n
    rare = 1 / microbatches
    gathered = whole * (rare if plan.keeps_weights else 1)
    again = 0.0 if plan.keeps_weights else whole
    if not plan.keeps_gradients:
        return gathered, again + whole
    factors = 2 * sequence * batch * packed(layout) / layout.size
    return gathered, again + min(factors, COPIES * whole)


def block_ends(
    plan: Plan,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    rank: int | None = None,
) -> Elements:
    """Elements of converting the stream at the block's ends, forward; backward as many.

    What ``rank`` of T sends, which is the same for all with a batch split. By default what the rank
    with most to send does, for which the others wait: with a sequence split and m > 2 all that it
    has. Of a packed row it depends on ``plan.documents``.
    """
    if not plan.has_own_order:
        return Counter()
    if plan.split == "batch":
        chunk = sequence * batch * shape.hidden // layout.size
        return Counter({("dim", "all_to_all"): 2 * (layout.m - 1) * chunk // layout.m})
    # Without documents all head groups deal their chunks alike.
    every = range(layout.size if plan.documents else layout.m)
    ranks = every if rank is None else [rank]
    sent = sequence // layout.size - min(kept(plan, layout, one, sequence) for one in ranks)
    return Counter({("dim", "all_to_all"): 2 * sent * batch * shape.hidden})


def training_ends(
    plan: Plan, layout: HelixLayout, shape: BlockShape, *, sequence: int, batch: int
) -> Elements:
    """The same where word ids go in and losses come out, which a sequence split puts in order."""
    if plan.split == "sequence":
        return Counter()
    return block_ends(plan, layout, shape, sequence=sequence, batch=batch)


def per_layer(
    plan: Plan,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    microbatches: int = 1,
    training: bool = True,
) -> float:
    """Elements of a layer and micro-batch, with its share of what is rarer.

    Forward and, in training, backward. The block's ends are shared by its layers, and weights
    gathered once a step by the step's ``microbatches``.
    """
    forward, backward = layer(plan, layout, shape, sequence=sequence, batch=batch)
    ends = training_ends(plan, layout, shape, sequence=sequence, batch=batch)
    passes = 2 if training else 1
    sent = forward.total() + passes * ends.total() / shape.num_layers
    once = int(plan.keeps_weights)
    if training:
        sent += backward.total()
        once += plan.keeps_gradients
    weights = (layout.m - 1) * shape.weights(layout) / layout.size
    return sent - once * weights * (1 - 1 / microbatches)


def decode_elements(
    split: str, layout: HelixLayout, shape: BlockShape, *, batch: int, positions: int = 0
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """What a rank sends in one layer of a decode step, one new token for each of ``batch``.

    Returns:
        Elements by (axis, kind), of the model's dtype and of fp32. ``tp all_reduce`` is that of
        attention and, where it is dense, the MLP: ``2 (T-1)/T b D`` each. With ``X`` packed
        channels and ``Q = slots K d`` those of QKV alone, the dim axis moves ``(m-1)/m b X / T`` by
        all_to_all (batch split); ``(m-1) b Q / T`` by all_gather and ``(m-1)/m b H/n (d + m)`` by
        all_to_all in fp32 (sequence split); ``2 (m-1)/m b H/n P`` by all_reduce in fp32 (scores).
        Only the last depends on the context, P ``positions``. All-reduces need not send whole
        elements, where T does not divide ``b D``. What MoE layers and norms over head
        segments (QK norms under ``scores``) send is not in it.
    """
    m, n, size = layout.m, layout.n, layout.size
    reduced = shape.sublayers * 2 * (size - 1) * batch * shape.hidden / size
    narrow, wide = {("tp", "all_reduce"): reduced}, {}
    heads = layout.num_attention_heads // n
    if m == 1:
        return narrow, wide
    if split == "batch":
        narrow["dim", "all_to_all"] = (m - 1) * batch * packed(layout) // (m * size)
    elif split == "sequence":
        qkv = layout.slots * layout.num_query_groups * layout.padded_channels
        narrow["dim", "all_gather"] = (m - 1) * batch * qkv // size
        wide["dim", "all_to_all"] = (m - 1) * batch * heads * (layout.padded_channels + m) // m
    else:
        wide["dim", "all_reduce"] = 2 * (m - 1) * batch * heads * positions / m
    return narrow, wide


def decode_bytes(
    split: str,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    batch: int,
    vocabulary: int,
    element_bytes: int,
    positions: int = 0,
) -> dict[tuple[str, str], int]:
    """Bytes a rank sends in a decode step of the whole model, by (axis, kind).

    Beside the layers (:func:`decode_elements`) these are the embedding's all-reduce over all T
    ranks, ``2 (T-1)/T b D``, and the gathering of the logits, ``(T-1) b V / T``. With m = 1 it is
    plain tensor parallelism. Bytes are rounded call by call, as the ledger does.
    """
    narrow, wide = decode_elements(split, layout, shape, batch=batch, positions=positions)
    size = layout.size
    sent: Counter[tuple[str, str]] = Counter()
    for elements, width in ((narrow, element_bytes), (wide, 4)):
        for key, count in elements.items():
            calls = shape.sublayers if key[0] == "tp" else 1
            sent[key] += shape.num_layers * calls * round(count * width / calls)
    embedded = 2 * (size - 1) * batch * shape.hidden / size
    sent["tp", "all_reduce"] += round(embedded * element_bytes)
    sent["tp", "all_gather"] += (size - 1) * batch * vocabulary // size * element_bytes
    return dict(sent)

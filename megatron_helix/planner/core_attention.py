"""Core attention of one layer and micro-batch on a rank: operations, memory traffic, memory.

Fused, scores stay on the chip, and half of them, above the diagonal, are left out. Unfused, they
are written, read for the softmax, its result written, and read; a backward pass does that twice.
Those kernels are short (their inner dimension is d) and run one after the other, so their
arithmetic and their memory traffic add up.
"""

from dataclasses import dataclass, replace

from megatron_helix.exchange.cost import (
    by_gaps,
    calls,
    merged_bytes,
    of_prefixes,
    summed_bytes,
)
from megatron_helix.kernels import parts, query_pieces
from megatron_helix.kernels.parts import Heads
from megatron_helix.kernels.query_pieces import Sight
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.core_attention import OWN


@dataclass(frozen=True, kw_only=True)
class Core:
    """What it takes.

    Attributes:
        flops: operations of its two matrix products, forward; of what a backward pass computes
            again a third, since it counts as two forward passes.
        keys_read: how often keys and values are read.
        score_bytes: of scores and probabilities through memory, forward; 0 where fused.
        summed_bytes: of gradients of keys and values that are added up piece by piece, backward.
        merged_bytes: of outputs and gradients of queries that are merged gap by gap, both passes.
        kept_bytes: for the backward pass.
        passing_bytes: beside that, while it is computed.
    """

    flops: float
    keys_read: float = 1.0
    score_bytes: float = 0.0
    summed_bytes: float = 0.0
    merged_bytes: float = 0.0
    kept_bytes: float = 0.0
    passing_bytes: float = 0.0


def planned(here: Deployment, *, fused_channels: int) -> str:
    """Which core attention is counted: what the layout asks for, but for ``auto``.

    That is taken for what it is where a pair of them was measured: the spec's where that is fused,
    else ``prefix``.

    Args:
        here: the deployment.
        fused_channels: largest head dimension with fused attention.
    """
    asked = here.layout.core_attention or "spec"
    if asked != "auto":
        return asked
    apart = bool(here.batch.documents)  # only the spec's keeps documents apart
    return "spec" if apart or here.model.kv_channels <= fused_channels else "prefix"


def of_layer(here: Deployment, *, fused_channels: int) -> Core:
    """What the core attention of the layout takes (:func:`planned`).

    A fused kernel of FlexAttention is counted at the rate of any other product, which makes it look
    faster than it is at a head dimension of 512.

    Args:
        here: the deployment.
        fused_channels: largest head dimension with fused attention.
    """
    core = planned(here, fused_channels=fused_channels)
    fused = here.model.kv_channels <= fused_channels or (core in OWN and OWN[core].fused)
    whole = _all_flops(here)
    if here.plan.exchange == "scores":
        return _unfused(here, whole, 1.0)
    if _by_gaps(here, fused_channels):
        rows = here.tokens * here.model.num_attention_heads * here.model.kv_channels / here.tp
        merged = rows * merged_bytes(here.cut, here.element_bytes)
        return Core(flops=whole * 0.5, merged_bytes=merged)
    # Under a sequence split a piece, one of 2T, attends to its own prefix: a rectangle for each of
    # its calls, of which no kernel leaves out what is above the diagonal.
    in_pieces = here.plan.split == "sequence" and here.phase != "decode"
    prefixes = of_prefixes(here.cut, _length(here), core) if in_pieces else 1.0
    summed = _summed(here, core) if in_pieces else 0.0
    if fused and core != "prefix":
        causal = 1.0 if here.phase == "decode" else prefixes if in_pieces else 0.5
        return Core(flops=whole * causal, summed_bytes=summed)
    if core == "prefix":
        return _in_pieces(here, whole)
    return replace(_unfused(here, whole, prefixes), summed_bytes=summed)


def _by_gaps(here: Deployment, fused_channels: int) -> bool:
    """Whether a rank's tokens attend gap by gap."""
    core, channels = planned(here, fused_channels=fused_channels), here.model.kv_channels
    apart = here.plan.split == "sequence" and here.phase == "train"
    return apart and by_gaps(core, channels, fused=channels <= fused_channels)


def _summed(here: Deployment, core: str) -> float:
    """Bytes of keys' and values' gradients on a rank, as its pieces' are added up."""
    model = here.model
    keys = 2 * here.tokens * here.groups / here.cut.n * model.kv_channels
    return keys * summed_bytes(here.cut, _length(here), core, here.element_bytes)


def laid_out(here: Deployment, *, fused_channels: int) -> float:
    """Keys that the runs of packed documents attend to, for each of the row's: copies of them.

    Of a document in one chunk of n, ``1 + 1/2m`` where its two pieces are attended to in one call;
    none gap by gap.
    """
    if not here.packs_runs or _by_gaps(here, fused_channels):
        return 0.0
    alone = replace(here.cut, n=1)
    each = 2 * calls(alone, _length(here), "spec")
    return each * of_prefixes(alone, _length(here), "spec")


def _length(here: Deployment) -> int:
    """Tokens of a sequence; of packed documents those that a token finds itself among."""
    return round(here.batch.keys)


def _all_flops(here: Deployment) -> float:
    """Two products of all queries with all keys of their documents.

    Those of a packed row are ``sum l^2 / sum l`` in the mean over tokens.
    """
    channels = here.model.num_attention_heads * here.model.kv_channels
    return 4 * here.tokens * here.batch.keys * channels / here.tp


def score_bytes(here: Deployment) -> float:
    """All scores of one layer and micro-batch on a rank, ``N s H / T``; H/n under ``scores``.

    There they are those of all tokens, in fp32; its fp32 products are counted at the rate of half
    precision, which makes it look faster than it is.
    """
    whole = here.plan.exchange == "scores"
    pairs = here.tokens * here.batch.keys
    heads = here.model.num_attention_heads / (here.cut.n if whole else here.tp)
    return pairs * heads * (4 if whole else here.element_bytes)


def _unfused(here: Deployment, flops: float, share: float) -> Core:
    """All scores at once, ``share`` of the square of them; the softmax of all is kept."""
    scores = score_bytes(here)
    return Core(
        flops=flops * share,
        score_bytes=4 * scores * share,
        kept_bytes=scores,
        passing_bytes=(2 if here.phase == "train" else 1) * scores,
    )


def _in_pieces(here: Deployment, flops: float) -> Core:
    """``prefix``: one tensor of a part's scores at a time, two where they are computed again.

    Their probabilities are kept where they take at most 1.5 times what queries, keys and values do;
    else a backward pass makes them again: a product of seven instead of six, three passes over
    memory of fifteen instead of twelve.
    """
    model, keys = here.model, here.batch.sequence_length
    runs = _runs(here)
    pieces = query_pieces.cut(runs, keys, Sight(left=None, right=0))
    rows = sum(length for _, length in runs)
    share = query_pieces.computed(pieces) / (rows * keys)
    heads, groups = (count / here.cut.n for count in (model.num_attention_heads, here.groups))
    given = (rows * heads + 2 * keys * groups) * model.kv_channels
    train = here.phase == "train"
    keep = train and heads * query_pieces.computed(pieces) <= parts.KEPT * given
    again = train and not keep
    scores = score_bytes(here)

    # Sequences that the rank attends for, however many of them there are in the micro-batch.
    sequences = here.tokens * here.cut.n / (here.tp * rows)
    shape = Heads(
        max(1, round(sequences)), max(1, round(heads)), max(1, round(groups)), model.kv_channels
    )
    at_once = parts.largest(parts.divide(pieces, shape), shape) * here.element_bytes
    return Core(
        flops=flops * share * (7 / 6 if again else 1),
        keys_read=sum(piece.keys for piece in pieces) / keys,
        score_bytes=4 * scores * share * (15 / 12 if again else 1),
        kept_bytes=scores * share if keep else 0.0,
        passing_bytes=at_once * (2 if again else 1),
    )


def _runs(here: Deployment) -> list[tuple[int, int]]:
    """(position, length) of the queries of a rank; under a sequence split, of the first one."""
    keys = here.batch.sequence_length
    if here.phase == "decode":
        return [(keys - 1, 1)]
    if here.plan.split != "sequence":
        return [(0, keys)]
    m, n = here.cut.m, here.cut.n
    length = max(1, keys // (2 * here.tp))
    starts = [chunk * (keys // n) for chunk in range(n)]
    return [(start + place * length, length) for start in starts for place in (0, 2 * m - 1)]

"""Which exchange and which split a micro-batch takes: what the flags say, or the fewest bytes.

The byte model counts the elements one rank must send for one layer's attention and dense MLP, forward
and backward, over all axes (N = s * b tokens, D hidden, F MLP features per projection, T = m * n;
``W = (slots K + H) d D + (2 or 3) F D`` weights of a layer):

=============  =========================================  ========================================
exchange       forward                                    backward
=============  =========================================  ========================================
activations    4 (T-1)/T N D + (m-1)/m X / n              6 (T-1)/T N D + (m-1)/m X / n
weights        4 (n-1)/T N D + (m-1)/T W                  6 (n-1)/T N D + 2 (m-1)/T W
=============  =========================================  ========================================

with ``X = N (slots K + H) d / m`` the projected tokens. The token terms are Megatron's under sequence
parallelism: each of the four linears gathers or reduce-scatters the stream once, and backward gathers
the input of the two column-parallel ones again. To ``weights`` with a batch split comes its share of
the conversion of the stream at the decoder block's two ends; to a sequence split the gathering of keys
and values, ``(m-1) N 2 K d / T`` forward and as much backward. MoE experts move the same in all.

``scores`` is taken only when asked for: it moves the square of the sequence length and rules out fused
attention kernels.
"""

from dataclasses import dataclass

from megatron_helix.layout import HelixLayout

EXCHANGES = ("auto", "activations", "weights", "scores")
SPLITS = ("auto", "batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What moves and which tokens a rank takes; ``split`` is "none" for scores."""

    exchange: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user asked for: an exchange and a split, each possibly ``auto``."""

    exchange: str = "auto"
    split: str = "auto"


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the byte model knows of a decoder block.

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


def resolve(
    choice: Choice,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    sequence_parallel: bool,
) -> Plan:
    """The plan for micro-batches of ``batch`` sequences of ``sequence`` tokens.

    Raises:
        ValueError: when what was asked for cannot run on this micro-batch.
    """
    _require_one_of("--helix-exchange", choice.exchange, EXCHANGES)
    _require_one_of("--helix-split", choice.split, SPLITS)
    if choice.exchange == "scores":
        return Plan(exchange="scores", split="none")
    if choice.exchange == "weights" and not sequence_parallel:
        raise ValueError(
            "--helix-exchange: weights keeps each token on one rank of the dim axis and needs"
            " --sequence-parallel, which is not set; add it, or use --helix-exchange activations"
        )
    splits = [_split(choice.split, layout, sequence, batch)]
    if choice.split == "auto" and splits == ["batch"] and sequence % layout.size == 0:
        splits.append("sequence")
    exchanges = ["activations", "weights"] if sequence_parallel else ["activations"]
    if choice.exchange != "auto":
        exchanges = [choice.exchange]
    plans = [Plan(exchange=exchange, split=split) for exchange in exchanges for split in splits]
    return min(plans, key=lambda plan: sum(elements(plan, layout, shape, sequence, batch)))


def elements(
    plan: Plan, layout: HelixLayout, shape: BlockShape, sequence: int, batch: int
) -> tuple[float, float]:
    """Elements a rank sends for one layer, (forward, backward), by the module's table."""
    m, n, size = layout.m, layout.n, layout.size
    tokens = sequence * batch
    packed = layout.slots * layout.num_query_groups + layout.num_attention_heads
    packed *= layout.kv_channels
    sublayers = 2 if shape.ffn else 1  # linears come in pairs: attention's, and a dense MLP's
    if plan.exchange == "activations":
        stream = (size - 1) / size * tokens * shape.hidden
        moved = (m - 1) / m * tokens * packed / size
        forward, backward = 2 * sublayers * stream + moved, 3 * sublayers * stream + moved
    else:
        stream = (n - 1) / size * tokens * shape.hidden
        weights = packed * shape.hidden + (3 if shape.gated else 2) * shape.ffn * shape.hidden
        moved = (m - 1) / size * weights
        forward, backward = 2 * sublayers * stream + moved, 3 * sublayers * stream + 2 * moved
        if plan.split == "batch":
            ends = 2 * (m - 1) / m * tokens * shape.hidden / size / shape.num_layers
            forward, backward = forward + ends, backward + ends
    if plan.split == "sequence":
        keys_values = (m - 1) * tokens * 2 * layout.num_query_groups * layout.kv_channels / size
        forward, backward = forward + keys_values, backward + keys_values
    return forward, backward


def explain(
    plan: Plan,
    choice: Choice,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    sequence_parallel: bool,
) -> str:
    """One line for the log: the plan, and what each exchange would send a layer and rank."""
    figures = []
    for exchange in ("activations", "weights"):
        if exchange == "weights" and not sequence_parallel:
            figures.append("weights needs --sequence-parallel")
            continue
        try:
            asked = Choice(exchange=exchange, split=choice.split)
            other = resolve(
                asked,
                layout,
                shape,
                sequence=sequence,
                batch=batch,
                sequence_parallel=sequence_parallel,
            )
        except ValueError:
            continue
        sent = sum(elements(other, layout, shape, sequence, batch))
        figures.append(f"{exchange} ({other.split} split) {sent:,.0f}")
    return (
        f"helix {layout.m}x{layout.n}: exchange {plan.exchange}, split {plan.split} for"
        f" micro-batches of {batch} x {sequence} tokens; elements sent a layer and rank, forward and"
        f" backward: {'; '.join(figures)}"
    )


def _split(asked: str, layout: HelixLayout, sequence: int, batch: int) -> str:
    """The split that runs, with the batch split first where both do."""
    if asked in ("auto", "batch") and batch % layout.m == 0:
        return "batch"
    if asked == "batch":
        raise ValueError(
            f"--micro-batch-size: must be a multiple of --helix-m ({layout.m}) to split the batch,"
            f" got {batch}; use a multiple, or --helix-split sequence"
        )
    if sequence % layout.size:
        raise ValueError(
            f"--seq-length: must be a multiple of --helix-m x --helix-n ({layout.size}) to split the"
            f" sequence, got {sequence}; use a multiple, or a --micro-batch-size that is a multiple"
            f" of --helix-m ({layout.m})"
        )
    return "sequence"


def _require_one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{flag}: must be one of {', '.join(allowed)}, got {value!r}")

"""Which exchange and split a micro-batch takes: what the flags say, or what costs least.

``auto`` compares plans for one layer, in all passes of the run: by time where the machine is
described (:mod:`megatron_helix.exchange.cost`), else by what they send, in the closed forms of
:mod:`megatron_helix.exchange.traffic`. Every rank computes the same from the same shape, so no rank
asks another. ``scores`` is taken only when asked for: it moves the square of the sequence length
and rules out fused attention kernels.
"""

from dataclasses import dataclass, replace

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.cost import layer_seconds
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.traffic import BlockShape, block_ends, layer, per_layer
from megatron_helix.machine.hardware import Hardware
from megatron_helix.partition.layout import HelixLayout

MOVES = ("activations", "weights", "scores")
EXCHANGES = ("auto", *MOVES)
SPLITS = ("auto", "batch", "sequence")
GATHERS = ("microbatch", "once", "step")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user asked for.

    Attributes:
        exchange: one of :data:`EXCHANGES`.
        split: one of :data:`SPLITS`.
        gather: one of :data:`GATHERS`.
        gather_layers: layers of every model chunk, its first ones, that gather so; the others
            gather in every micro-batch. None: all of them.
        chunks: of the model, which pipeline stages hold.
        microbatches: micro-batches of a step; what is gathered once a step is shared by them.
        keeps_sequences: the sequence is cut by context parallelism already: no sequence split.
        keeps_order: what needs stock's token order in every layer, which ``weights`` leaves with a
            batch split, and with a sequence split that is balanced: the flag that asks for it (a
            loss per sequence, say).
        training: whether a backward pass follows.
        core_attention: a value of ``--helix-core-attention``; what it costs depends on the split.
        machine: that plans are compared on; None compares what they send.
    """

    exchange: str = "auto"
    split: str = "auto"
    gather: str = "microbatch"
    gather_layers: int | None = None
    chunks: int = 1
    microbatches: int = 1
    keeps_sequences: bool = False
    keeps_order: str | None = None
    training: bool = True
    core_attention: str = "spec"
    machine: Hardware | None = None

    def of_layer(self, plan: Plan, place: int | None) -> Plan:
        """A block's plan, as one of its layers has it.

        Args:
            plan: of the layers that gather as asked.
            place: of the layer in its model chunk, from 1; None for one that is in none.
        """
        if self.gather_layers is None or (place is not None and place <= self.gather_layers):
            return plan
        return replace(plan, gather="microbatch")


def require_known(choice: Choice) -> None:
    """Refuse names and numbers that are none of the flags' values.

    Raises:
        UserError: naming the flag, its values, and what was given.
    """
    _require_one_of("--helix-exchange", choice.exchange, EXCHANGES)
    _require_one_of("--helix-split", choice.split, SPLITS)
    _require_one_of("--helix-gather", choice.gather, GATHERS)
    layers = choice.gather_layers
    if layers is not None and layers < 1:
        raise UserError(
            f"--helix-gather-layers: must be a positive integer, got {layers}; leave it away for"
            " all layers"
        )
    if layers is not None and choice.gather == "microbatch":
        raise UserError(
            "--helix-gather-layers: is of --helix-gather once or step, got"
            f" {layers} and microbatch, which keeps no layer's weights; say --helix-gather, or"
            " leave it away"
        )


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
        UserError: when what was asked for cannot run on this micro-batch.
    """
    require_known(choice)
    if choice.exchange == "scores":
        return Plan(exchange="scores", split="none")
    if choice.exchange == "weights" and not sequence_parallel:
        raise UserError(
            "--helix-exchange: weights keeps each token on one rank of the dim axis and needs"
            " --sequence-parallel, which is not set; add it, or use --helix-exchange activations"
        )
    asked = "batch" if choice.keeps_sequences and choice.split == "auto" else choice.split
    if choice.keeps_sequences and asked == "sequence":
        raise UserError(
            "--helix-split: sequence and --context-parallel-size > 1 both cut the sequence, got"
            " both; leave one of them away"
        )
    splits = [_split(asked, layout, sequence, batch)]
    if asked == "auto" and splits == ["batch"] and sequence % layout.size == 0:
        splits.append("sequence")
    exchanges = ["activations", "weights"] if sequence_parallel else ["activations"]
    if choice.exchange != "auto":
        exchanges = [choice.exchange]
    plans = [
        Plan(
            exchange=exchange,
            split=split,
            gather=choice.gather,
            balanced=not (choice.keeps_order and exchange == "weights"),
        )
        for exchange in exchanges
        for split in splits
        if not (choice.keeps_order and exchange == "weights" and split == "batch")
    ]
    if not plans:
        raise UserError(
            "--helix-exchange: weights with --helix-split batch leaves the token order that"
            f" {choice.keeps_order} needs, got both; use"
            f" {_or_sequence(layout, sequence)}--helix-exchange activations"
        )
    return min(
        plans, key=lambda plan: _costs(plan, choice, layout, shape, sequence=sequence, batch=batch)
    )


def packed_plan(
    choice: Choice, layout: HelixLayout, shape: BlockShape, *, tokens: int, sequence_parallel: bool
) -> Plan:
    """The plan for a row of so many packed tokens, whatever documents they are of.

    Raises:
        UserError: when what was asked for cannot run on packed rows.
    """
    if choice.exchange == "scores":
        raise UserError(
            "--helix-exchange: scores moves the scores of all tokens of a row with each other, and"
            " packed documents are apart, got both; use --helix-exchange activations or weights"
        )
    if choice.split == "batch":
        raise UserError(
            "--helix-split: batch deals out the sequences of a micro-batch, and packed rows are"
            " one, got both; use --helix-split sequence"
        )
    if choice.keeps_sequences:
        raise UserError(
            "--context-parallel-size: must be 1 where rows are packed under --helix-m > 1, since"
            " both cut documents; leave context parallelism away"
        )
    if tokens % layout.size:
        raise UserError(
            "--seq-length: packed rows must be a multiple of --helix-m x --helix-n"
            f" ({layout.size}) tokens, got {tokens} in a micro-batch; use"
            f" {multiples(tokens, layout.size)} of them"
        )
    return resolve(
        replace(choice, split="sequence"),
        layout,
        shape,
        sequence=tokens,
        batch=1,
        sequence_parallel=sequence_parallel,
    )


def _costs(
    plan: Plan,
    choice: Choice,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
) -> float:
    """Of a layer and micro-batch: seconds, or elements sent where no machine is described.

    The mean of layers that gather as the plan says and of those that gather in every micro-batch.
    """
    size = {"sequence": sequence, "batch": batch, "microbatches": choice.microbatches}

    def of(plan: Plan) -> float:
        if choice.machine is None:
            return per_layer(plan, layout, shape, **size, training=choice.training)
        known = plan, layout, shape, choice.machine
        of_run = {"training": choice.training, "core_attention": choice.core_attention}
        return layer_seconds(*known, **size, **of_run)

    if choice.gather_layers is None or not plan.keeps_weights:
        return of(plan)
    kept = min(1.0, choice.gather_layers * choice.chunks / shape.num_layers)
    return kept * of(plan) + (1 - kept) * of(replace(plan, gather="microbatch"))


def explain(
    plan: Plan, choice: Choice, layout: HelixLayout, shape: BlockShape, *, sequence: int, batch: int
) -> str:
    """One line for the log: the plan, and what each exchange would cost with this split.

    How often weights are gathered is the user's to say, for it takes memory: what that costs stands
    beside it.
    """
    split = "batch" if plan.split == "none" else plan.split
    by_bytes = choice.machine is None
    gathers = GATHERS if choice.training and choice.microbatches > 1 else (choice.gather,)
    others = {"activations": Plan(exchange="activations", split=split)}
    for gather in gathers:
        name = "weights" if gather == "microbatch" else f"weights by --helix-gather {gather}"
        if gather != "microbatch" and choice.gather_layers:
            name += f" --helix-gather-layers {choice.gather_layers}"
        others[name] = Plan(exchange="weights", split=split, gather=gather)
    others["scores"] = Plan(exchange="scores", split="none")
    figures = []
    for name, other in others.items():
        costs = _costs(other, choice, layout, shape, sequence=sequence, batch=batch)
        figures.append(f"{name} {costs:,.0f}" if by_bytes else f"{name} {costs * 1e3:,.3f}")
    unit = "elements a rank sends" if by_bytes else "ms of communication and core attention"
    return (
        f"helix {layout.m}x{layout.n}: exchange {plan.exchange}, split {plan.split}, for"
        f" micro-batches of {batch} x {sequence} tokens; {unit} a layer and micro-batch"
        f" (predicted): {', '.join(figures)}"
    )


def cache_split(choice: Choice, layout: HelixLayout, batch: int) -> str:
    """How the cache of ``batch`` sequences is cut: ``batch``, ``sequence``, or ``none`` (scores).

    The batch where m divides it: a step then needs no merge.

    Raises:
        UserError: when the batch split was asked for and m does not divide the batch.
    """
    if choice.exchange == "scores":
        return "none"
    if choice.split == "batch" and batch % layout.m:
        raise UserError(
            f"--helix-split: batch needs a multiple of --helix-m ({layout.m}) sequences, got"
            f" {batch}; use {multiples(batch, layout.m)}, or --helix-split sequence"
        )
    if choice.split != "auto":
        return choice.split
    return "sequence" if batch % layout.m else "batch"


def prefill_plan(
    choice: Choice,
    layout: HelixLayout,
    shape: BlockShape,
    *,
    sequence: int,
    batch: int,
    sequence_parallel: bool,
) -> Plan:
    """The plan for a prefill: of what the choice allows, what sends least in a forward alone.

    What needs stock's order is of training.

    Raises:
        UserError: when what was asked for cannot run on these tokens.
    """
    choice = replace(choice, gather="microbatch", gather_layers=None, keeps_order=None)
    if choice.exchange != "scores":
        choice = replace(choice, split=cache_split(choice, layout, batch))
    names = ["activations", "weights"] if sequence_parallel else ["activations"]
    if choice.exchange != "auto":
        names = [choice.exchange]
    size = {"sequence": sequence, "batch": batch}
    plans = [
        resolve(
            replace(choice, exchange=name),
            layout,
            shape,
            **size,
            sequence_parallel=sequence_parallel,
        )
        for name in names
    ]

    def costs(plan: Plan) -> float:
        if choice.machine is not None:
            known = plan, layout, shape, choice.machine
            core = choice.core_attention
            return layer_seconds(*known, **size, training=False, serving=True, core_attention=core)
        forward, _ = layer(plan, layout, shape, **size)
        ends = block_ends(plan, layout, shape, **size)
        return forward.total() + ends.total() / shape.num_layers

    return min(plans, key=costs)


def decode_plan(split: str) -> Plan:
    """The plan for a step on a cache that is cut as :func:`cache_split` says."""
    exchange = {"batch": "activations", "sequence": "partials", "none": "scores"}[split]
    return Plan(exchange=exchange, split=split)


def _split(asked: str, layout: HelixLayout, sequence: int, batch: int) -> str:
    """The split that runs, with the batch split first where both do."""
    if asked in ("auto", "batch") and batch % layout.m == 0:
        return "batch"
    if asked == "batch":
        raise UserError(
            f"--micro-batch-size: must be a multiple of --helix-m ({layout.m}) to split the batch,"
            f" got {batch}; use {_or_sequence(layout, sequence)}{multiples(batch, layout.m)}"
        )
    if sequence % layout.size:
        raise UserError(
            f"--seq-length: must be a multiple of --helix-m x --helix-n ({layout.size}) to split"
            f" the sequence, got {sequence}; use {multiples(sequence, layout.size)}, or a"
            f" --micro-batch-size of {multiples(batch, layout.m)} and the batch split"
        )
    return "sequence"


def multiples(of: int, unit: int) -> str:
    """The multiples of ``unit`` next to a number."""
    below = of // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _or_sequence(layout: HelixLayout, sequence: int) -> str:
    """The other split, where it can be had."""
    return "" if sequence % layout.size else "--helix-split sequence, or "


def _require_one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{flag}: must be one of {', '.join(allowed)}, got {value!r}")

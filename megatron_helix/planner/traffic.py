"""Every collective of a step: which ranks, how many bytes one of them sends, how often.

:func:`transfers` lists them for one rank; :func:`step_bytes` adds them up by the axes and kinds of
:mod:`megatron_helix.experiment.comm_ledger`, and by its counting rule, call by call. A test holds
the sums against what the ledger counts in Megatron's own loop; ``cp`` and ``gtp``, which need a
GPU, are not in it.

Per micro-batch, with N tokens, T tensor-parallel ranks, ``c = N D / T``, V vocabulary:

* decoder layers: :mod:`megatron_helix.exchange.traffic`; stock is its ``activations`` without a dim
  axis. In decode, without sequence parallelism, two all-reduces of ``N D`` instead.
* embedding: fwd reduce_scatter, bwd all_gather of ``c`` each over T. Learned positions need the
  whole stream: fwd all_reduce of ``N D``.
* head: fwd all_gather, bwd all_gather and reduce_scatter of ``c`` over T; the cross entropy three
  fp32 all_reduces of N (largest logit, logit of the label, sum of exponentials). Both move to the
  head and dim axes as :mod:`megatron_helix.vocabulary` says.
* experts (``r = k N / T`` rows a rank after routing to k experts): all_to_all over ep of rows there
  and back and of their fp32 probabilities there; over etp all_gather there and reduce_scatter back.
  What a rank receives depends on routing. Counted is the mean, exact for a sum over the ranks.
* pipeline: c to the next stage, and its gradient back.
* batch: the first tensor-parallel rank broadcasts what a stage needs of it.

Per step: gradients over the replicas (fp32; with a distributed optimizer reduce-scattered, and the
weights all-gathered), of norms and routers over T (they see 1/T of the tokens), of the tied
embedding between first and last stage, and single numbers: the gradient norm, the loss.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from megatron_helix.exchange import traffic
from megatron_helix.exchange.traffic import Plan
from megatron_helix.planner import parameters
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config import BatchConfig, LayoutConfig, ModelConfig

AXES = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "head": "HELIX_HEAD_GROUP",
    "dim": "HELIX_DIM_GROUP",
    "dp": "DATA_PARALLEL_GROUP_WITH_CP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "gtp": "GTP_WEIGHT_REMAT_GROUP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "etp": "EXPERT_TENSOR_PARALLEL_GROUP",
    "etp_ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "expert_dp": "EXPERT_DATA_PARALLEL_GROUP",
    "expert_model": "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP",
    "model": "MODEL_PARALLEL_GROUP",
    "embedding": "EMBEDDING_GROUP",
    "optimizer": "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
    "world": "default_pg",
}
FP32 = INT32 = 4
INT64 = 8


class Transfer(NamedTuple):
    """Calls of one collective in one step, all alike.

    Attributes:
        what: what moves, for a reader.
        axis: short name, a key of :data:`AXES`.
        kind: as the ledger names it.
        when: ``forward``, ``backward`` (both a sum over micro-batches) or ``step``.
        ranks: size of the group.
        stride: distance of its neighbours in global ranks.
        calls: in a step.
        sent_bytes: by one rank in a step.
    """

    what: str
    axis: str
    kind: str
    when: str
    ranks: int
    stride: int
    calls: int
    sent_bytes: float


def share(kind: str, ranks: int) -> float:
    """What a rank sends of a tensor, by the ledger's rule."""
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if kind == "all_to_all":
        return (ranks - 1) / ranks
    if kind in ("all_gather", "reduce_scatter"):
        return ranks - 1
    return 1 if ranks > 1 else 0  # send; broadcast on its source


def step_bytes(
    model: ModelConfig,
    layout: LayoutConfig,
    batch: BatchConfig,
    *,
    world_size: int,
    rank: int,
    phase: str = "train",
    element_bytes: int = 4,
) -> dict[tuple[str, str], float]:
    """Bytes that one rank sends in one step, by (axis, kind) as the ledger names them.

    Args:
        model: the model.
        layout: how the ranks share it.
        batch: of one step.
        world_size: ranks.
        rank: global rank.
        phase: ``train``, ``prefill`` or ``decode``.
        element_bytes: of activations and weights; 4 in single precision, 2 in half.

    Raises:
        ValueError: when the layout cannot run.
    """
    here = Deployment(model, layout, batch, world_size, phase).check()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: need 0 <= rank < {world_size}, got {rank}")
    stage = rank // (world_size // layout.pp)
    sums: Counter[tuple[str, str]] = Counter()
    for moved in transfers(here, stage, element_bytes=element_bytes, source=rank % here.tp == 0):
        sums[AXES[moved.axis], moved.kind] += moved.sent_bytes  # type: ignore[assignment]
    return {key: float(sent) for key, sent in sums.items() if sent}


def transfers(
    here: Deployment, stage: int, *, element_bytes: int = 2, source: bool = True
) -> list[Transfer]:
    """Every collective that a rank of ``stage`` takes part in; ``source`` if it is rank 0 of T."""
    book = _Book(here, element_bytes)
    first, last = stage == 0, stage == here.stages - 1
    _layers(book, first, last)
    if here.layout.gtp > 1:
        _weight_shards(book)
    if here.model.num_experts:
        _experts(book)
    if here.layout.cp > 1:
        _context(book)
    if first:
        _embedding(book)
    if last:
        _head(book)
    if here.stages > 1:
        _pipeline(book, first, last)
    if here.phase == "train":
        if source:
            _data(book, first, last)
        _gradients(book, first, last)
        _numbers(book, last)
    return book.entries


@dataclass
class _Book:
    here: Deployment
    element_bytes: int
    entries: list[Transfer] = field(default_factory=list)

    @cached_property
    def groups(self) -> dict[str, tuple[int, int]]:
        """(ranks, stride) of every axis."""
        here, layout = self.here, self.here.layout
        beyond = here.tp * layout.cp
        stage = here.world_size // layout.pp
        return {
            "tp": (here.tp, 1),
            "head": (here.cut.n, here.cut.m),
            "dim": (here.cut.m, 1),
            "cp": (layout.cp, here.tp),
            "gtp": (layout.gtp, beyond),
            "dp": (here.replicas, here.tp * layout.gtp),
            "pp": (layout.pp, stage),
            "embedding": (2, (layout.pp - 1) * stage),
            "model": (here.tp * layout.pp, 1),
            "etp": (layout.etp, 1),
            "ep": (layout.ep, layout.etp),
            "etp_ep": (layout.etp * layout.ep, 1),
            "expert_dp": (here.expert_replicas, layout.etp * layout.ep),
            "expert_model": (layout.etp * layout.ep * layout.pp, 1),
            "optimizer": (here.world_size, 1),
            "world": (here.world_size, 1),
        }

    def sent(self, what: str, axis: str, kind: str, when: str, sent: float, calls: int) -> None:
        """``sent`` bytes by a rank in all calls."""
        ranks, stride = self.groups[axis]
        if ranks > 1 and when in self.phases:
            entry = Transfer(
                what=what,
                axis=axis,
                kind=kind,
                when=when,
                ranks=ranks,
                stride=stride,
                calls=calls,
                sent_bytes=sent,
            )
            self.entries.append(entry)

    def call(
        self,
        what: str,
        axis: str,
        kind: str,
        when: str,
        elements: float,
        calls: int = 1,
        size: int | None = None,
    ) -> None:
        """Calls on a tensor of ``elements``; for every micro-batch unless ``when`` is ``step``."""
        size = self.element_bytes if size is None else size
        calls *= 1 if when == "step" else self.here.microbatches
        one = round(elements * size * share(kind, self.groups[axis][0]))
        self.sent(what, axis, kind, when, one * calls, calls)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("forward", "backward", "step") if self.here.phase == "train" else ("forward",)


def _layers(book: _Book, first: bool, last: bool) -> None:
    here = book.here
    if not here.sequence_parallel:
        _unsplit_layers(book)
        return
    plan = here.plan if here.cut.m > 1 else Plan(exchange="activations", split="batch")
    size = {"sequence": here.sequence, "batch": here.layout.micro_batch}
    directions = traffic.layer(plan, here.cut, here.block, **size)
    every = here.layers * here.microbatches
    once = plan.exchange == "weights" and plan.gather == "step"
    weights = (here.cut.m - 1) * here.block.weights(here.cut) // here.tp if once else 0
    calls = _calls(plan, here.block.sublayers)
    for when, elements in zip(("forward", "backward"), directions, strict=True):
        for (axis, kind), count in elements.items():
            if axis == "dim" and once:  # weights, and keys and values under a sequence split
                count -= weights if when == "forward" or kind == "reduce_scatter" else 0
            if count:
                what = "attention and MLP linears" if axis != "dim" else f"exchange {plan.exchange}"
                width = FP32 if plan.exchange == "scores" and axis == "dim" else book.element_bytes
                number = calls.get((when, axis, kind), 1) * every
                book.sent(what, axis, kind, when, count * every * width, number)
    if once:
        number = 2 * here.block.sublayers * here.layers
        wide = weights * here.layers
        book.sent("weights", "dim", "all_gather", "step", wide * book.element_bytes, number)
        book.sent("weights", "dim", "reduce_scatter", "step", wide * FP32, number)
    ends = traffic.block_ends(plan, here.cut, here.block, **size)["dim", "all_to_all"]
    if ends and not here.embeds_in_block_order:
        converted = ends // 2 * (first + last) * here.microbatches * book.element_bytes
        for when in ("forward", "backward") if first or last else ():
            number = (first + last) * here.microbatches
            book.sent("token order", "dim", "all_to_all", when, converted, number)


def _weight_shards(book: _Book) -> None:
    """Weights cut over gtp as well: gathered for each pass, and their gradients scattered."""
    here = book.here
    matrices = 2 * here.block.sublayers
    one = parameters.layer_matrices(here) / here.layout.gtp / matrices
    number = matrices * here.layers
    for when in ("forward", "backward"):
        book.call("weights", "gtp", "all_gather", when, one, number)
    book.call("weights", "gtp", "reduce_scatter", "backward", one, number)


def _unsplit_layers(book: _Book) -> None:
    """Without sequence parallelism, as in decode: the stream is summed after each row linear."""
    here = book.here
    stream = here.tokens * here.model.hidden_size
    linears = here.block.sublayers * here.layers
    for when in ("forward", "backward"):
        book.call("attention and MLP linears", "tp", "all_reduce", when, stream, linears)
    if here.plan.exchange == "activations":
        moved = here.tokens * traffic.packed(here.cut) / here.tp / 2
        book.call("exchange activations", "dim", "all_to_all", "forward", moved, 2 * here.layers)


def _calls(plan: Plan, linears: int) -> dict[tuple[str, str, str], int]:
    """Calls of each collective of a layer, which the closed forms of bytes leave out."""
    axis = "head" if plan.exchange == "weights" else "tp"
    calls = {
        ("forward", axis, "all_gather"): linears,
        ("backward", axis, "all_gather"): 2 * linears,
        ("forward", axis, "reduce_scatter"): linears,
        ("backward", axis, "reduce_scatter"): linears,
        ("forward", "dim", "all_to_all"): 2,
        ("backward", "dim", "all_to_all"): 2,
    }
    weights = 2 * linears if plan.exchange == "weights" and plan.gather == "microbatch" else 0
    extra = int(plan.split == "sequence")
    return calls | {
        ("forward", "dim", "all_gather"): weights + extra,
        ("backward", "dim", "all_gather"): weights,
        ("backward", "dim", "reduce_scatter"): weights + extra,
    }


def _experts(book: _Book) -> None:
    here = book.here
    rows = here.tokens * here.model.moe_router_topk / here.tp
    rows_D = rows * here.model.hidden_size
    layers = here.layers
    experts = here.model.num_experts or 0
    what = "tokens to experts"
    book.call("expert counts", "etp_ep", "all_gather", "forward", experts, layers, INT64)
    for when in ("forward", "backward"):
        book.call(what, "ep", "all_to_all", when, rows_D, 2 * layers)
        book.call(what, "ep", "all_to_all", when, rows, layers, FP32)
    gathers, scatters = ("forward", "backward"), ("backward", "forward")
    for there, back in zip(gathers, scatters, strict=True):
        book.call(what, "etp", "all_gather", there, rows_D, layers)
        book.call(what, "etp", "reduce_scatter", back, rows_D, layers)
    book.call(what, "etp", "all_gather", "forward", rows, layers, FP32)
    book.call(what, "etp", "reduce_scatter", "backward", rows, layers, FP32)


def _context(book: _Book) -> None:
    """Ring attention: keys and values visit every rank, and their gradients with them."""
    here, layout = book.here, book.here.layout
    both = 2 * here.tokens * here.model.query_groups * here.model.kv_channels / here.tp
    hops = (layout.cp - 1) * here.layers
    book.call("keys and values", "cp", "send", "forward", both, hops)
    book.call("keys and values", "cp", "send", "backward", 2 * both, hops)


def _embedding(book: _Book) -> None:
    here = book.here
    D = here.model.hidden_size
    chunk = here.tokens * D / here.tp
    if here.embeds_in_block_order:
        table = here.vocabulary * D / here.tp
        book.call("embedding", "dim", "all_gather", "forward", table)
        book.call("embedding", "dim", "reduce_scatter", "backward", table)
        book.call("embedding", "head", "reduce_scatter", "forward", chunk)
        book.call("embedding", "head", "all_gather", "backward", chunk)
    elif here.sequence_parallel and here.model.position_embedding_type != "learned_absolute":
        book.call("embedding", "tp", "reduce_scatter", "forward", chunk)
        book.call("embedding", "tp", "all_gather", "backward", chunk)
    else:
        book.call("embedding", "tp", "all_reduce", "forward", here.tokens * D)
        if here.sequence_parallel:
            book.call("embedding", "tp", "all_gather", "backward", chunk)


def _head(book: _Book) -> None:
    here = book.here
    D = here.model.hidden_size
    chunk = here.tokens * D / here.tp
    axis = "head" if here.embeds_in_block_order else "tp"
    if here.phase != "train":
        last = here.layout.micro_batch  # logits of one token a sequence
        if here.sequence_parallel:
            book.call("LM head", "tp", "all_gather", "forward", chunk)
        book.call("logits", "tp", "all_gather", "forward", last * here.vocabulary / here.tp)
        return
    if here.sequence_parallel:
        book.call("LM head", axis, "all_gather", "forward", chunk)
        book.call("LM head", axis, "all_gather", "backward", chunk)
        book.call("LM head", axis, "reduce_scatter", "backward", chunk)
    losses = here.tokens
    if here.embeds_in_block_order:
        table = here.vocabulary * D / here.tp
        for when, kind in (
            ("forward", "all_gather"),
            ("backward", "all_gather"),
            ("backward", "reduce_scatter"),
        ):
            book.call("LM head", "dim", kind, when, table)
        losses //= here.cut.m
        book.call("losses", "dim", "all_gather", "forward", losses, size=FP32)
    book.call("cross entropy", axis, "all_reduce", "forward", losses, 3, FP32)


def _pipeline(book: _Book, first: bool, last: bool) -> None:
    here = book.here
    stream = here.tokens * here.model.hidden_size
    chunk = stream / here.tp if here.sequence_parallel else stream
    if not last:
        book.call("pipeline", "pp", "send", "forward", chunk)
    if not first:
        book.call("pipeline", "pp", "send", "backward", chunk)


def _data(book: _Book, first: bool, last: bool) -> None:
    """Tokens and positions for the embedding, labels and loss mask for the head."""
    for needed, size in ((first, INT64), (first, INT64), (last, INT64), (last, FP32)):
        if needed:
            book.call("batch", "tp", "broadcast", "forward", book.here.tokens, size=size)


def _gradients(book: _Book, first: bool, last: bool) -> None:
    here, layout = book.here, book.here.layout
    tensors = parameters.dense_tensors(here, first, last)
    experts = parameters.expert_tensors(here)
    if layout.ep == 1:  # Megatron keeps them with the dense weights then
        tensors, experts = tensors + experts, []
    what = "gradients"
    if not layout.distributed_optimizer:
        book.call(what, "dp", "all_reduce", "step", sum(tensors), size=FP32)
    else:
        tied = here.stages > 1 and (first or last)
        table = tensors[:1] if tied else []  # a bucket of its own
        for bucket in (table, tensors[len(table) :]):
            _distributed(book, "dp", bucket)
    if experts and not layout.distributed_optimizer:
        book.call(what, "expert_dp", "all_reduce", "step", sum(experts), size=FP32)
    elif experts:
        _distributed(book, "expert_dp", experts)
    if here.sequence_parallel:
        unsplit = parameters.sequence_parallel(here, last)
        book.call("gradients of norms", "tp", "all_reduce", "step", unsplit, size=FP32)
    if here.stages > 1 and (first or last):
        table = here.vocabulary * here.model.hidden_size / here.tp
        book.call("gradient of the tied embedding", "embedding", "all_reduce", "step", table, 1, 4)


def _distributed(book: _Book, axis: str, tensors: list[int]) -> None:
    """Gradients out and weights back, of a bucket padded as Megatron pads it."""
    ranks, _ = book.groups[axis]
    if not tensors:
        return
    unit = math.lcm(ranks, 128)
    padded = sum(-(-size // 64) * 64 for size in tensors)
    shard = -(-padded // unit) * unit // ranks
    book.call("gradients", axis, "reduce_scatter", "step", shard, size=FP32)
    # Dense weights and experts have an optimizer each, and each of the two gathers all weights.
    gathers = 2 if book.here.model.num_experts and book.here.layout.ep > 1 else 1
    book.call("weights", axis, "all_gather", "step", shard, gathers)


def _numbers(book: _Book, last: bool) -> None:
    """Loss, gradient norm and other single numbers."""
    here = book.here
    what = "loss, gradient norm"
    if last:
        book.call(what, "dp", "all_reduce", "step", 2, size=FP32)
    if here.layout.distributed_optimizer:
        book.call(what, "optimizer", "all_reduce", "step", 1, size=FP32)
        book.call(what, "model", "all_reduce", "step", 1, 2, FP32)
    else:
        book.call(what, "model", "all_reduce", "step", 1, 3, FP32)
        if here.model.num_experts and here.layout.ep > 1:
            book.call(what, "expert_model", "all_reduce", "step", 1, size=FP32)
    book.call(what, "world", "all_reduce", "step", 1, size=INT32)

"""Every collective of a step: which ranks, how many bytes one of them sends, how often.

:func:`transfers` lists them for one rank; :func:`step_bytes` adds them up by the axes and kinds of
:mod:`megatron_helix.recording.comm_ledger`, and by its counting rule, call by call. A test holds
the sums against what the ledger counts in Megatron's own loop; ``cp``, ``gtp`` and Megatron FSDP,
which need a GPU, are not in it.

Per micro-batch, with N tokens, T tensor-parallel ranks, ``c = N D / T``, V vocabulary:

* decoder layers: :mod:`megatron_helix.exchange.traffic`; stock is its ``activations`` without a dim
  axis. In decode, without sequence parallelism, two all-reduces of ``N D`` instead.
* packed QKV of stock with more ranks than query groups (X rows of weight): fwd all_gather, bwd
  reduce_scatter of ``N X / T`` over T.
* biases of what is cut by rows, under ``weights``: B of a layer, fwd all_gather and bwd all_to_all
  of ``(m-1) B / T`` over dim, in every micro-batch. Learnable softmax offsets: bwd all_gather of
  ``(m-1) H / n``.
* embedding: fwd reduce_scatter, bwd all_gather of ``c`` each over T. Learned positions need the
  whole stream: fwd all_reduce of ``N D``.
* head: fwd all_gather, bwd all_gather and reduce_scatter of ``c`` over T; the cross entropy three
  fp32 all_reduces of N (largest logit, logit of the label, sum of exponentials). Both move to the
  head and dim axes as :mod:`megatron_helix.layers.vocabulary` says.
* experts (``r = k N / T`` rows a rank after routing to k experts, ``k N`` in decode): all_to_all
  over ep of rows there and back and of their probabilities there; over etp all_gather there
  and reduce_scatter back. What a rank receives, and what it keeps for experts of its own, depends
  on routing. Counted are even loads, 1/ep of the rows kept; what is sent and kept together is that
  exactly in a sum over the ranks.
* context parallelism: keys and values by p2p, a2a or all_gather:
  :mod:`megatron_helix.planner.context`.
* GTP (Megatron's ``generalized_tensor_parallelism``): of every matrix, embedding and head its
  all_gather for each pass that multiplies by it and the reduce_scatter of its gradient, in every
  micro-batch; an all_reduce of the gradients of what it leaves whole.
* FSDP: :mod:`megatron_helix.planner.fsdp`.
* pipeline: c to the next stage, and its gradient back; in decode the whole stream, and the new
  tokens from the last stage to the first.
* batch: the first tensor-parallel rank broadcasts what a stage needs of it.

Per step: gradients over the replicas (with a distributed optimizer reduce-scattered, and the
weights all-gathered), of norms and routers over T (they see 1/T of the tokens), of the tied
embedding between first and last stage, and single numbers: the gradient norm, the loss, and in
fp16 whether a gradient overflowed.
"""

import math
from collections import Counter

from megatron_helix.exchange import traffic
from megatron_helix.exchange.cost import moves
from megatron_helix.exchange.plan import Plan
from megatron_helix.planner import context, fsdp, model_ends, parameters
from megatron_helix.planner.book import AXES, FP32, INT32, INT64, Book, Transfer
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.gradients import gradients, numbers

STOCK = Plan(exchange="activations", split="batch")  # without a dim axis


def step_bytes(here: Deployment, rank: int) -> dict[tuple[str, str], float]:
    """Bytes that one global rank sends in one step, by (axis, kind) as the ledger names them.

    Raises:
        ValueError: when the layout cannot run.
    """
    here.check()
    if not 0 <= rank < here.world_size:
        raise ValueError(f"rank: need 0 <= rank < {here.world_size}, got {rank}")
    per_stage = here.world_size // here.layout.pp
    stage = rank // per_stage
    sums: Counter[tuple[str, str]] = Counter()
    for moved in transfers(here, stage, rank):
        sums[AXES[moved.axis], moved.kind] += moved.sent_bytes  # type: ignore[assignment]
    return {key: float(sent) for key, sent in sums.items() if sent}


def transfers(here: Deployment, stage: int, rank: int | None = None) -> list[Transfer]:
    """Every collective that a rank of ``stage`` takes part in.

    Args:
        here: the deployment.
        stage: pipeline stage.
        rank: a global one of that stage. By default the most that any does in each: broadcast a
            batch, lead the replicas, and send of the stream, at the block's ends, what the rank
            that keeps least does.
    """
    book = Book(here)
    first, last = stage == 0, stage == here.stages - 1
    place = None if rank is None else rank % here.tp
    source = not place
    of_stage = here.world_size // here.stages
    leads = rank is None or rank % of_stage < here.tp
    trails = rank is None or rank % of_stage >= of_stage - here.tp
    _layers(book, first, last, place)
    if here.gathers_qkv:
        for when, kind in (("forward", "all_gather"), ("backward", "reduce_scatter")):
            own = here.tokens * here.qkv_rows / here.tp
            book.call("QKV of all ranks", "tp", kind, when, own, here.layers)
    if here.layout.gtp > 1:
        _weight_shards(book, first, last)
    if here.layout.fsdp:
        fsdp.weights(book, first, last)
    if here.model.num_experts:
        _experts(book)
    if here.layout.cp > 1:
        context.parallel(book)
    if first:
        model_ends.embedding(book)
    if last:
        model_ends.head(book)
    if here.stages > 1:
        _pipeline(book, first, last)
    if here.in_loop and source:
        _data(book, first, last)
    if here.phase == "train":
        gradients(book, first, last, leads=leads, trails=trails)
        numbers(book, last)
    return book.entries


def _layers(book: Book, first: bool, last: bool, place: int | None) -> None:
    here = book.here
    if here.phase == "decode":
        _decode_layers(book)
        return
    if here.tp == 1:
        return
    plan = here.plan
    for of_layers, layers in here.plans:
        _linears(book, of_layers if here.cut.m > 1 else STOCK, layers)
    every = here.layers * here.microbatches
    if plan.exchange == "weights":
        for bias in parameters.column_biases(here):
            gathered = (here.cut.m - 1) * bias * every * here.element_bytes
            book.sent("biases", "dim", "all_gather", "forward", gathered, every)
            book.sent("biases", "dim", "all_to_all", "backward", gathered, every)
    if here.model.softmax_type == "learnable" and here.cut.m > 1:
        heads = here.model.num_attention_heads // here.cut.n
        gathered = (here.cut.m - 1) * heads * every * here.element_bytes
        book.sent("softmax offsets", "dim", "all_gather", "backward", gathered, every)
    size = {"sequence": here.sequence, "batch": here.layout.micro_batch}
    # Of packed rows as of one document each: what else they hold is not the plan's to know.
    ends = traffic.block_ends(plan, here.cut, here.block, **size, rank=place)["dim", "all_to_all"]
    if ends and (times := model_ends.converts(here, first=first, last=last)):
        converted = ends // 2 * times * here.microbatches * here.element_bytes
        for when in ("forward", "backward"):
            number = times * here.microbatches
            book.sent("token order", "dim", "all_to_all", when, converted, number)


def _linears(book: Book, plan: Plan, layers: int) -> None:
    """Of ``layers`` with a plan: in every micro-batch, and once a step."""
    here = book.here
    size = {"sequence": here.sequence, "batch": here.layout.micro_batch}
    directions = traffic.layer(plan, here.cut, here.block, **size)
    every = layers * here.microbatches
    weights = (here.cut.m - 1) * here.block.weights(here.cut) // here.tp
    once = {"all_gather": plan.keeps_weights, "send": plan.keeps_gradients}
    calls = traffic.calls(plan, here.block)
    early = traffic.begun_early(plan, here.cut, here.block, **size)
    for when, elements, beside in zip(("forward", "backward"), directions, early, strict=True):
        for (axis, kind), count in elements.items():
            part = beside.get((axis, kind), 0.0)
            if axis == "dim" and once.get(kind):
                count, part = count - weights, 0.0  # keys and values under a sequence split stay
            what = "attention and MLP linears" if axis != "dim" else f"exchange {plan.exchange}"
            width = FP32 if plan.exchange == "scores" and axis == "dim" else here.element_bytes
            number, sent = calls.get((when, axis, kind), 1) * every, count * every * width
            ahead = round(part * sent), round(part * number)
            if ahead[0]:
                book.sent(what, axis, kind, when, *ahead, beside=moves(axis, kind))
            if sent > ahead[0]:
                book.sent(what, axis, kind, when, sent - ahead[0], number - ahead[1])
    number, wide = here.block.gathered * layers, weights * layers
    if plan.keeps_weights:
        gathered = wide * here.element_bytes
        book.sent("weights", "dim", "all_gather", "step", gathered, number, beside="weights")
    if plan.keeps_gradients:
        summed = wide * here.gradient_bytes
        number *= here.cut.m - 1
        book.sent("weights", "dim", "send", "step", summed, number, beside="gradients")


def _weight_shards(book: Book, first: bool, last: bool) -> None:
    """Weights cut over gtp as well: gathered for each pass, and their gradients scattered.

    So are embedding and head; the embedding's backward pass has no use for its weight.
    """
    here = book.here
    matrices = 2 * here.block.sublayers
    layer = parameters.layer_matrices(here) / here.layout.gtp / matrices
    layers = matrices * here.layers
    table = math.prod(parameters.table(here))
    gathers = [("forward", layer, layers), ("backward", layer, layers)]
    gathers += [("forward", table, first + last), ("backward", table, int(last))]
    for when, one, number in gathers:
        if number:
            book.call("weights", "gtp", "all_gather", when, one, number, beside="weights")
    for one, number in ((layer, layers), (table, first + last)):
        if number:
            when, beside = "backward", "gradients"
            book.call("weights", "gtp", "reduce_scatter", when, one, number, beside=beside)


def _decode_layers(book: Book) -> None:
    """A step of one token a sequence: the stream is whole on every rank."""
    here = book.here
    narrow, wide = traffic.decode_elements(
        here.plan.split,
        here.cut,
        here.block,
        batch=here.layout.micro_batch,
        positions=here.batch.sequence_length,
    )
    every = here.layers * here.microbatches
    for elements, width in ((narrow, here.element_bytes), (wide, FP32)):
        for (axis, kind), count in elements.items():
            stream = axis == "tp"
            what = "attention and MLP linears" if stream else f"exchange {here.plan.exchange}"
            twice = here.plan.exchange == "activations"  # QKV there, context back
            calls = here.block.sublayers if stream else 2 if twice else 1
            sent = calls * round(count * width / calls)
            book.sent(what, axis, kind, "forward", sent * every, calls * every)


def _experts(book: Book) -> None:
    here = book.here
    rows = here.tokens * here.model.moe_router_topk / here.stream_ranks
    rows_D = rows * here.model.hidden_size
    layers = here.layers
    experts = here.model.num_experts or 0
    what = "tokens to experts"
    book.call("expert counts", "etp_ep", "all_gather", "forward", experts, layers, INT64)
    for when in ("forward", "backward"):
        book.call(what, "ep", "all_to_all", when, rows_D, 2 * layers)
        book.call(what, "ep", "all_to_all", when, rows, layers)
    gathers, scatters = ("forward", "backward"), ("backward", "forward")
    for there, back in zip(gathers, scatters, strict=True):
        book.call(what, "etp", "all_gather", there, rows_D, layers)
        book.call(what, "etp", "reduce_scatter", back, rows_D, layers)
    book.call(what, "etp", "all_gather", "forward", rows, layers)
    book.call(what, "etp", "reduce_scatter", "backward", rows, layers)


def _pipeline(book: Book, first: bool, last: bool) -> None:
    here = book.here
    stream = here.tokens * here.model.hidden_size
    chunk = stream / here.tp if here.sequence_parallel else stream
    if not last:
        book.call("pipeline", "pp", "send", "forward", chunk)
    if not first:
        book.call("pipeline", "pp", "send", "backward", chunk)
    if here.phase == "decode" and last:
        book.call("new tokens", "pp", "send", "forward", here.layout.micro_batch, size=INT64)


def _data(book: Book, first: bool, last: bool) -> None:
    """Tokens and positions for the embedding, labels and loss mask for the head.

    Of packed rows every stage is told where documents end.
    """
    for needed, size in ((first, INT64), (first, INT64), (last, INT64), (last, FP32)):
        if needed:
            book.call("batch", "tp", "broadcast", "forward", book.here.tokens, size=size)
    if book.here.batch.documents:
        rows = book.here.layout.micro_batch
        # Where documents end, filled up to a row's length; how many numbers; the longest document.
        ends = rows * (book.here.batch.sequence_length + 1)
        for count, size in ((1, INT64), (ends, INT32), (rows, INT32)):
            book.call("documents", "tp", "broadcast", "forward", count, size=size)

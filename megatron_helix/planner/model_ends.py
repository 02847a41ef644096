"""The ends of a model: embedding and LM head, and the order of tokens between them and layers.

What is chosen is the choice of :mod:`megatron_helix.layers.vocabulary`, which has its reasons and
the elements that a rank sends.
"""

import math
from dataclasses import replace

from megatron_helix.exchange.plan import Plan
from megatron_helix.planner import parameters
from megatron_helix.planner.book import FP32, Book
from megatron_helix.planner.deployment import Deployment


def table_plan(here: Deployment) -> Plan | None:
    """How head and embedding gather their shards, the latter but for learned positions, or None."""
    if not here.plan.has_own_order or not here.in_loop:
        return None
    if here.tokens <= here.vocabulary // here.cut.n:
        return None
    every = here.kept_layers == here.layers
    return here.plan if every else replace(here.plan, gather="microbatch")


def gathered_parameters(here: Deployment, stage: int) -> int:
    """A rank's own in those of a stage's embedding and head that gather their shards."""
    if table_plan(here) is None:
        return 0
    ends = (stage == here.stages - 1) + (stage == 0 and not _learns_positions(here))
    return ends * math.prod(parameters.table(here))


def converts(here: Deployment, *, first: bool, last: bool) -> int:
    """How often a micro-batch's stream changes its order on a stage.

    Args:
        here: the deployment.
        first: whether the stage has the embedding.
        last: whether it has the head.
    """
    if not here.plan.has_own_order:
        return 0
    if here.plan.split == "batch" or not here.in_loop:
        stock = table_plan(here) is None
        return (first and (stock or _learns_positions(here))) + (last and stock)
    return int(first and _learns_positions(here))  # word ids and labels come in order


def embedding(book: Book) -> None:
    """Of the first stage, in every micro-batch."""
    here = book.here
    D = here.model.hidden_size
    chunk = here.tokens * D / here.tp
    gathered = table_plan(here)
    if gathered is not None and not _learns_positions(here):
        _table(book, "embedding", gathered, "forward")
        book.call("embedding", "head", "reduce_scatter", "forward", chunk)
        book.call("embedding", "head", "all_gather", "backward", chunk)
    elif here.sequence_parallel and not _learns_positions(here):
        book.call("embedding", "tp", "reduce_scatter", "forward", chunk)
        book.call("embedding", "tp", "all_gather", "backward", chunk)
    else:
        book.call("embedding", "tp", "all_reduce", "forward", here.tokens * D)
        if here.sequence_parallel:
            book.call("embedding", "tp", "all_gather", "backward", chunk)


def head(book: Book) -> None:
    """Of the last stage: the LM head, and the cross entropy in training."""
    here = book.here
    D = here.model.hidden_size
    chunk = here.tokens * D / here.tp
    gathered = table_plan(here)
    axis = "tp" if gathered is None else "head"
    if not here.in_loop:
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
    if gathered is not None:
        _table(book, "LM head", gathered, "forward", "backward")
        losses //= here.cut.m
        book.call("losses", "dim", "all_gather", "forward", losses, size=FP32)
    book.call("cross entropy", axis, "all_reduce", "forward", losses, 3, FP32)


def _table(book: Book, what: str, plan: Plan, *passes: str) -> None:
    """The vocabulary of a head group: gathered by these passes, its gradient sent home."""
    here = book.here
    table, others = math.prod(parameters.table(here)), here.cut.m - 1
    for when in ("step",) if plan.keeps_weights else passes:
        book.call(what, "dim", "all_gather", when, table)
    if plan.keeps_gradients:
        summed = others * table * here.gradient_bytes
        book.sent(what, "dim", "send", "step", summed, others, beside="gradients")
    else:
        book.call(what, "dim", "all_to_all", "backward", table * here.cut.m)


def _learns_positions(here: Deployment) -> bool:
    """Whether positions are added to whole sequences, in stock's order."""
    return here.model.position_embedding_type == "learned_absolute"

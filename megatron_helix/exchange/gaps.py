"""Which calls of core attention a rank makes whose keys of other tokens lie between its own.

A rank of the dim axis has some runs of every document (:mod:`megatron_helix.exchange.tokens`,
:mod:`megatron_helix.exchange.dealing`); what is between them, its gaps, other ranks have. Its own
tokens attend to each other in one call, and those behind a gap to all of the gap. The first gaps of
all documents are one call, the second ones another, and so on: with one head group there are two
at most, and of two ranks one (:mod:`megatron_helix.kernels.gap_attention`).
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from megatron_helix.exchange.dealing import Run, joined
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.tokens import runs_of, segment_order
from megatron_helix.kernels.copies import on_device
from megatron_helix.kernels.gap_attention import Block, Gaps, Others, Packed
from megatron_helix.partition.layout import HelixLayout


class Sight(NamedTuple):
    """Neighbouring queries of a document, and neighbouring keys.

    Attributes:
        row: the first query, of the rank's tokens in order.
        rows: how many.
        key: the first key; of one's own tokens, or of the whole row.
        keys: how many.
    """

    row: int
    rows: int
    key: int
    keys: int


def own_sights(runs: list[Run]) -> list[Sight]:
    """Of every document, a rank's tokens and again they."""
    found, row = [], 0
    for _, mine in groupby(runs, key=lambda run: run.document):
        length = sum(run.end - run.start for run in mine)
        found.append(Sight(row, length, row, length))
        row += length
    return found


def gap_sights(runs: list[Run]) -> list[list[Sight]]:
    """Call after call, the gaps and the tokens behind them; keys are positions of the row."""
    calls: list[list[Sight]] = []
    row = 0
    for document, of_document in groupby(runs, key=lambda run: run.document):
        mine = list(of_document)
        last = row + sum(run.end - run.start for run in mine)
        end, number = document, 0
        for run in mine:
            if run.start > end:
                if number == len(calls):
                    calls.append([])
                calls[number].append(Sight(row, last - row, end, run.start - end))
                number += 1
            row += run.end - run.start
            end = run.end
    return calls


@lru_cache(maxsize=64)
def gaps_of(
    plan: Plan, layout: HelixLayout, segment: int, tokens: int, device: torch.device
) -> Gaps:
    """The calls of dim rank ``segment``, for sequences of so many tokens, or a packed row of them.

    Args:
        plan: with a sequence split.
        layout: the partition.
        segment: the rank.
        tokens: of a sequence.
        device: of the tokens.
    """
    runs = joined(runs_of(plan, layout, segment, tokens))
    calls = gap_sights(runs)
    share = tokens // layout.m
    order = None
    if layout.m == 2:
        # Between two of my runs is one of the other's, whole; or there is nothing.
        at = {}
        row = 0
        for run in joined(runs_of(plan, layout, 1 - segment, tokens)):
            at[run.start] = row
            row += run.end - run.start
        calls = [[sight._replace(key=at[sight.key]) for sight in call] for call in calls]
    else:
        dealing = {"balanced": plan.balanced, "documents": plan.documents}
        back = segment_order(layout, tokens, torch.device("cpu"), **dealing).back
        order = (on_device(back // share, device), on_device(back % share, device))
    places = Others(segment, order)
    if not plan.documents:
        blocks = (_sliced(call) for call in calls)
        return Gaps(Block(causal=True), tuple(blocks), places)
    gathered = share if order is None else tokens
    return Gaps(
        Block(causal=True, packed=_packed(own_sights(runs), share, share, device)),
        tuple(Block(causal=False, packed=_packed(call, share, gathered, device)) for call in calls),
        places,
    )


def _sliced(call: list[Sight]) -> Block:
    """Of one document."""
    (one,) = call
    rows, keys = slice(one.row, one.row + one.rows), slice(one.key, one.key + one.keys)
    return Block(causal=False, rows=rows, keys=keys)


def _packed(call: list[Sight], queries: int, keys: int, device: torch.device) -> Packed:
    """Of several documents; ``queries`` and ``keys`` are how many there are in all."""
    row, rows, key, of_keys = torch.tensor(call, dtype=torch.int32).unbind(dim=1)
    seen = None
    if int(rows.sum()) < queries:
        seen = torch.zeros(queries, dtype=torch.bool)
        for one in call:
            seen[one.row : one.row + one.rows] = True
        seen = on_device(seen, device)
    sums = [torch.cat([x.new_zeros(1), x.cumsum(0, dtype=torch.int32)]) for x in (rows, of_keys)]
    firsts = [torch.cat([x, x.new_full((1,), end)]) for x, end in ((row, queries), (key, keys))]
    return Packed(
        *on_device(torch.stack(sums + firsts), device).unbind(),  # one copy, not four
        most_queries=int(rows.max()),
        most_keys=int(of_keys.max()),
        seen=seen,
    )

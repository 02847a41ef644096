"""Which tokens a rank takes, by direct indexing of one global tensor. Copies compare exactly."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix.exchange.pieces import kept, pieces
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.tokens import (
    by_segment,
    chunk_positions,
    from_block_order,
    in_sequence_order,
    to_block_order,
)
from megatron_helix.exchange.traffic import BlockShape, block_ends
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed

S, B, HIDDEN = 24, 4, 3


def layout_of(m: int, n: int) -> HelixLayout:
    """Any layout of this shape."""
    return HelixLayout(m=m, n=n, num_attention_heads=n, num_query_groups=n, kv_channels=8 * m)


SPLITS = {
    "batch": Plan(exchange="weights", split="batch"),
    "sequence": Plan(exchange="weights", split="sequence"),
    # Of two documents, so that what a rank gives is put into an order that is not its own inverse.
    "documents": Plan(exchange="weights", split="sequence", documents=(0, 5, S)),
}


def inside(split: str, layout: HelixLayout, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """A rank's part of ``[s, b, hidden]`` in the block's order."""
    i, j = layout.coordinates(rank)
    chunk = whole.chunk(layout.n)[i]
    if split == "batch":
        return chunk.chunk(layout.m, dim=1)[j]
    if split == "documents":
        positions = chunk_positions(layout, j, S, documents=SPLITS[split].documents)
        return whole[positions].chunk(layout.n)[i]
    pieces = chunk.chunk(2 * layout.m)
    return torch.cat([pieces[j], pieces[2 * layout.m - 1 - j]])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1)])
def test_the_stream_is_put_in_order_and_back(m: int, n: int, split: str) -> None:
    layout, plan = layout_of(m, n), SPLITS[split]
    whole = torch.arange(S * B * HIDDEN, dtype=torch.float32).view(S, B, HIDDEN)

    def convert() -> tuple[torch.Tensor, ...]:
        rank = dist.get_rank()
        groups = [dist.new_group(layout.dim_group(i * m)) for i in range(n)]
        dim_group = groups[layout.coordinates(rank)[0]]
        outside = whole.chunk(4)[rank].clone().requires_grad_()
        head_group = layout.coordinates(rank)[0]
        share = to_block_order(outside, plan, layout, dim_group, head_group)
        share.backward(-inside(split, layout, rank, whole))
        mine = inside(split, layout, rank, whole).clone().requires_grad_()
        back = from_block_order(mine, plan, layout, dim_group, head_group)
        back.backward(-whole.chunk(4)[rank])
        return share.detach(), outside.grad, back.detach(), mine.grad

    for rank, (share, share_grad, back, back_grad) in enumerate(run_distributed(convert, 4)):
        assert torch.equal(share, inside(split, layout, rank, whole))
        assert torch.equal(share_grad, -whole.chunk(4)[rank])
        assert torch.equal(back, whole.chunk(4)[rank])
        assert torch.equal(back_grad, -inside(split, layout, rank, whole))


CUTS = [(m, n) for m in (2, 3, 4, 8) for n in (1, 2)]
LENGTHS = (5, 6)  # tokens of a rank: 2m pieces of m of them are alike, or not


def plans_of(tokens: int) -> list[Plan]:
    """What decides how a row is dealt out: as one document, and as three."""
    documents = (0, tokens // 3 + 1, tokens // 3 + 2, tokens)
    one = Plan(exchange="weights", split="sequence")
    return [one, replace(one, documents=documents), Plan(exchange="weights", split="batch")]


def sent_by_segment() -> dict[tuple[int, int, int, int, int], tuple[list[int], list[int]]]:
    """Elements, (forward, backward), of both ends for each cut, head group, length and plan.

    The ranks are the segments of one head group after the other.
    """
    groups = {m: dist.new_group(list(range(m)), group_desc="dim") for m, _ in CUTS[::2]}
    found = {}
    ledger = CommLedger()
    uninstall = install(ledger)
    for (m, n), length in product(CUTS, LENGTHS):
        if dist.get_rank() >= m:
            continue
        layout = layout_of(m, n)
        for i, (number, plan) in product(range(n), enumerate(plans_of(m * n * length))):
            x = torch.randn(length, 24, HIDDEN, requires_grad=True)
            there = to_block_order(x, plan, layout, groups[m], i)
            y = from_block_order(there, plan, layout, groups[m], i)
            forward = ledger.take()["dim", "all_to_all"]
            y.sum().backward()
            both = forward, ledger.take()["dim", "all_to_all"]
            found[m, n, i, length, number] = tuple(entry.elements for entry in both)
    uninstall()
    return found


def test_every_rank_sends_all_but_the_pieces_that_it_has() -> None:
    """The closed form of a conversion, rank by rank, and the largest by default."""
    counted = run_distributed(sent_by_segment, 8)
    shape = BlockShape(hidden=HIDDEN, ffn=0, gated=False, num_layers=1)
    for (m, n), length in product(CUTS, LENGTHS):
        layout, tokens = layout_of(m, n), m * n * length
        for number, plan in enumerate(plans_of(tokens)):
            known = partial(block_ends, plan, layout, shape, sequence=tokens, batch=24)
            said = [known(rank=rank)["dim", "all_to_all"] for rank in range(m * n)]
            sent = [counted[j][m, n, i, length, number] for i in range(n) for j in range(m)]
            assert sent == [(each, each) for each in said], (m, n, length, plan)
            assert known()["dim", "all_to_all"] == max(said)


def test_of_even_chunks_a_rank_keeps_half_or_nothing() -> None:
    """Chunk j is pieces 2j and 2j + 1, of which rank j may have one, by the first or the last."""
    plan = Plan(exchange="weights", split="sequence")
    halves = {2: [3, 3], 3: [3, 0, 0], 4: [3, 0, 3, 0], 8: [3, 0, 0, 0, 0, 3, 0, 0]}
    for m, tokens in halves.items():
        for n in (1, 2):
            layout = layout_of(m, n)
            found = [kept(plan, layout, rank, 6 * m * n) for rank in range(m * n)]
            assert found == tokens * n


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_pieces_of_all_segments_are_the_sequence(
    m: int, n: int, length: int, balanced: bool
) -> None:
    layout = layout_of(m, n)
    tokens = m * n * length
    positions = [chunk_positions(layout, j, tokens, balanced=balanced) for j in range(m)]
    sequence = torch.arange(tokens)
    assert torch.equal(torch.cat(positions).sort().values, sequence)
    for j, mine in enumerate(positions):
        assert torch.equal(mine, mine.sort().values)  # ascending, as a causal mask needs
        listed = [
            range(piece.start, piece.end) for piece in pieces(layout, j, tokens, balanced=balanced)
        ]
        assert mine.tolist() == [position for piece in listed for position in piece]
        if not balanced:
            assert set((mine // length % m).tolist()) == {j}  # chunks j, m + j, 2m + j, ...
    assert torch.equal(by_segment(sequence, layout, balanced=balanced), torch.stack(positions))
    gathered = torch.cat(positions)
    assert torch.equal(in_sequence_order(gathered, layout, balanced=balanced), sequence)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("m", [2, 3, 4, 8, 16])
def test_every_segment_has_the_same_causal_work(m: int, n: int) -> None:
    """Of a kernel that skips what is hidden, and of one that computes whole prefixes."""
    layout, tokens = layout_of(m, n), 64 * m * n

    def work(balanced: bool) -> list[tuple[int, int]]:
        return [
            (
                sum(int(p) + 1 for p in chunk_positions(layout, j, tokens, balanced=balanced)),
                sum(p.length * p.end for p in pieces(layout, j, tokens, balanced=balanced)),
            )
            for j in range(m)
        ]

    assert len(set(work(True))) == 1
    causal = [skipping for skipping, _ in work(False)]
    assert max(causal) * m / sum(causal) == pytest.approx(1 + (m - 1) / (m * n), rel=0.01)

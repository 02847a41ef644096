"""The two ends of the ``activations`` exchange, by direct indexing of one canonical global tensor.

Everything here is a copy of numbers, never arithmetic on them, so all comparisons are exact.
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange.activations import context_to_segments, qkv_to_whole_heads
from megatron_helix.partition import tiles
from megatron_helix.partition.layout import PADDING, HelixLayout
from tests.distributed import run_distributed

S, B = 24, 12  # tokens of a sequence, sequences

HEADS = {
    "mha": {"num_attention_heads": 4, "num_query_groups": 4},
    "gqa": {"num_attention_heads": 8, "num_query_groups": 2},
    "gqa_with_output_gate": {"num_attention_heads": 4, "num_query_groups": 2, "output_gate": True},
}
ROTARY = {
    "no_rotary": {},
    "rotary": {"rotary_dim": 16},
    "partial_rotary": {"rotary_dim": 8},
    "interleaved_rotary": {"rotary_dim": 16, "rotary_interleaved": True},
}


class Seen(NamedTuple):
    """What one rank computed."""

    qkv: torch.Tensor
    qkv_grad: torch.Tensor
    context: torch.Tensor
    context_grad: torch.Tensor


def numbered(*shape: int) -> torch.Tensor:
    """A tensor in which every element is another integer (exact in double precision)."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def widths(layout: HelixLayout) -> tuple[int, int]:
    """Columns of the whole QKV and of the whole context."""
    d = layout.kv_channels
    return layout.num_query_groups * layout.slots * d, layout.num_attention_heads * d


def tile(whole: torch.Tensor, order: torch.Tensor, layout: HelixLayout, rank: int) -> torch.Tensor:
    """A rank's stored columns of the canonical ``[s, b, width]``."""
    return tiles.stored(whole, order.chunk(layout.size)[rank], axis=-1)


def share(whole: torch.Tensor, layout: HelixLayout, rank: int, split: str) -> torch.Tensor:
    """Whole heads of a rank's head group for its 1/m of the tokens."""
    i, j = layout.coordinates(rank)
    heads = whole.chunk(layout.n, dim=-1)[i]
    if split == "batch":
        return heads.chunk(layout.m, dim=1)[j]
    pieces = [part.chunk(2 * layout.m) for part in heads.chunk(layout.n)]
    return torch.cat([part for early in pieces for part in (early[j], early[-1 - j])])


def dim_group_of(layout: HelixLayout, rank: int) -> dist.ProcessGroup:
    """A rank's dim group; every rank makes all of them, in one order."""
    groups = [dist.new_group(layout.dim_group(i * layout.m)) for i in range(layout.n)]
    return groups[layout.coordinates(rank)[0]]


Case = tuple[str, ...]  # heads, rotary, split
SPLITS = ("batch", "sequence")


def layout_of(m: int, n: int, heads: str, rotary: str) -> HelixLayout:
    """The partition of one of the cases."""
    return HelixLayout(m=m, n=n, kv_channels=16, **HEADS[heads], **ROTARY[rotary])


def wholes(layout: HelixLayout) -> list[torch.Tensor]:
    """QKV and context, canonical."""
    return [numbered(S, B, width) for width in widths(layout)]


def exchange(m: int, n: int) -> dict[Case, Seen]:
    """Every case, there and its gradient back. Runs in the ranks."""
    rank, results = dist.get_rank(), {}
    dim_group = dim_group_of(layout_of(m, n, "mha", "rotary"), rank)
    for heads, rotary, split in product(HEADS, ROTARY, SPLITS):
        layout = layout_of(m, n, heads, rotary)
        qkv, context = wholes(layout)
        stored = tile(qkv, layout.qkv_rows(), layout, rank)
        # What comes out for padding goes nowhere, whatever it is.
        stored[..., layout.qkv_rows().chunk(layout.size)[rank] == PADDING] = torch.nan
        stored.requires_grad_()
        whole = qkv_to_whole_heads(stored, layout, dim_group, split)
        # Gradients arrive permuted in training: they have been through views of [s, b, heads, d].
        gradient = share(-qkv, layout, rank, split)
        whole.backward(gradient.transpose(0, 2).contiguous().transpose(0, 2))

        mine = share(context, layout, rank, split).contiguous().requires_grad_()
        segments = context_to_segments(mine, layout, dim_group, split)
        gradient = tile(-context, layout.proj_columns(), layout, rank)
        segments.backward(gradient.transpose(0, 2).contiguous().transpose(0, 2))
        found = Seen(whole.detach(), stored.grad, segments.detach(), mine.grad)
        results[heads, rotary, split] = found
    return results


@cache
def seen(m: int, n: int) -> list[dict[Case, Seen]]:
    """Of every rank and case, run together: what starts a run costs more than a case."""
    return run_distributed(exchange, m * n, m, n)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1), (3, 2)])  # the last pads its tiles
def test_exchange_is_indexing_of_the_canonical_tensor(
    m: int, n: int, heads: str, rotary: str, split: str
) -> None:
    layout = layout_of(m, n, heads, rotary)
    qkv, context = wholes(layout)
    for rank, of_rank in enumerate(seen(m, n)):
        found = of_rank[heads, rotary, split]
        assert torch.equal(found.qkv, share(qkv, layout, rank, split))
        assert torch.equal(found.qkv_grad, tile(-qkv, layout.qkv_rows(), layout, rank))
        assert torch.equal(found.context, tile(context, layout.proj_columns(), layout, rank))
        assert torch.equal(found.context_grad, share(-context, layout, rank, split))


def ends_of(m: int, n: int, rotary: str) -> tuple[HelixLayout, HelixLayout]:
    """Two layouts, one of whose QKV is as many heads as the other's context.

    As many packed heads in one's QKV (4 groups of 3 queries, key, value) as the other has heads.
    """
    shape = {"m": m, "n": n, "kv_channels": 16, **ROTARY[rotary]}
    at_qkv = HelixLayout(num_attention_heads=12, num_query_groups=4, **shape)
    return at_qkv, HelixLayout(num_attention_heads=20, num_query_groups=20, **shape)


def there_and_back(m: int, n: int) -> dict[Case, torch.Tensor]:
    """Every case. Runs in the ranks."""
    rank, results = dist.get_rank(), {}
    dim_group = dim_group_of(ends_of(m, n, "rotary")[0], rank)
    for rotary, split in product(ROTARY, SPLITS):
        at_qkv, at_context = ends_of(m, n, rotary)
        mine = share(numbered(S, B, 20 * 16), at_context, rank, split).contiguous()
        there = context_to_segments(mine, at_context, dim_group, split)
        results[rotary, split] = qkv_to_whole_heads(there, at_qkv, dim_group, split)
    return results


@cache
def back(m: int, n: int) -> list[dict[Case, torch.Tensor]]:
    """Of every rank and case, run together."""
    return run_distributed(there_and_back, m * n, m, n)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1), (3, 1)])
def test_the_two_ends_undo_each_other(m: int, n: int, rotary: str, split: str) -> None:
    _, at_context = ends_of(m, n, rotary)
    for rank, of_rank in enumerate(back(m, n)):
        expected = share(numbered(S, B, 20 * 16), at_context, rank, split)
        assert torch.equal(of_rank[rotary, split], expected)

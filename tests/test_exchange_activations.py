"""The two ends of the ``activations`` exchange, by direct indexing of one canonical global tensor.

Everything here is a copy of numbers, never arithmetic on them, so all comparisons are exact.
"""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange.activations import (
    batch_share,
    context_to_segments,
    qkv_to_whole_heads,
)
from megatron_helix.layout import HelixLayout
from tests.distributed import run_distributed

S, B = 3, 4  # tokens of a sequence, sequences

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
    round_trip: torch.Tensor


def numbered(*shape: int) -> torch.Tensor:
    """A tensor in which every element is another integer (exact in double precision)."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def widths(layout: HelixLayout) -> tuple[int, int]:
    """Columns of the whole QKV and of the whole context."""
    d = layout.kv_channels
    return layout.num_query_groups * layout.slots * d, layout.num_attention_heads * d


def tile(whole: torch.Tensor, order: torch.Tensor, layout: HelixLayout, rank: int) -> torch.Tensor:
    """A rank's stored columns of the canonical ``[s, b, width]``."""
    return whole[..., order.chunk(layout.size)[rank]]


def share(whole: torch.Tensor, layout: HelixLayout, rank: int) -> torch.Tensor:
    """Whole heads of a rank's head group for its 1/m of the sequences."""
    i, j = layout.coordinates(rank)
    return whole.chunk(layout.n, dim=-1)[i].chunk(layout.m, dim=1)[j]


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1)])
def test_exchange_is_indexing_of_the_canonical_tensor(m: int, n: int, heads: str, rotary: str) -> None:
    layout = HelixLayout(m=m, n=n, kv_channels=16, **HEADS[heads], **ROTARY[rotary])
    qkv, context = (numbered(S, B, width) for width in widths(layout))

    def exchange() -> Seen:
        rank = dist.get_rank()
        groups = [
            dist.new_group([i * m + j for j in range(m)]) for i in range(n)
        ]  # every rank makes all groups, in one order
        dim_group = groups[layout.coordinates(rank)[0]]

        stored = tile(qkv, layout.qkv_rows(), layout, rank).requires_grad_()
        whole = qkv_to_whole_heads(stored, layout, dim_group)
        # Gradients arrive permuted in training: they have been through views of [s, b, heads, d].
        gradient = share(-qkv, layout, rank)
        whole.backward(gradient.transpose(0, 2).contiguous().transpose(0, 2))

        mine = share(context, layout, rank).contiguous().requires_grad_()
        segments = context_to_segments(mine, layout, dim_group)
        gradient = tile(-context, layout.proj_columns(), layout, rank)
        segments.backward(gradient.transpose(0, 2).contiguous().transpose(0, 2))

        # Without K, V and gates, QKV is shaped like the context; the two then undo each other.
        heads_only = HelixLayout(
            m=m, n=n, kv_channels=16, num_attention_heads=3 * 4, num_query_groups=4, **ROTARY[rotary]
        )
        whole_heads = share(numbered(S, B, 5 * 4 * 16), heads_only, rank).contiguous()
        as_context = HelixLayout(
            m=m, n=n, kv_channels=16, num_attention_heads=20, num_query_groups=20, **ROTARY[rotary]
        )
        there = context_to_segments(whole_heads, as_context, dim_group)
        back = qkv_to_whole_heads(there, heads_only, dim_group)
        return Seen(whole.detach(), stored.grad, segments.detach(), mine.grad, back - whole_heads)

    for rank, seen in enumerate(run_distributed(exchange, layout.size)):
        assert torch.equal(seen.qkv, share(qkv, layout, rank))
        assert torch.equal(seen.qkv_grad, tile(-qkv, layout.qkv_rows(), layout, rank))
        assert torch.equal(seen.context, tile(context, layout.proj_columns(), layout, rank))
        assert torch.equal(seen.context_grad, share(-context, layout, rank))
        assert not seen.round_trip.any()


@pytest.mark.parametrize("m", [1, 2, 4])
def test_a_mask_is_split_like_the_batch(m: int) -> None:
    mask = numbered(4, 1, 2, 2)
    shares = [batch_share(mask, m, segment) for segment in range(m)]
    assert torch.equal(torch.cat(shares), mask)
    assert [len(part) for part in shares] == [4 // m] * m


def test_a_mask_for_all_sequences_and_no_mask_are_not_split() -> None:
    mask = numbered(1, 1, 2, 2)
    assert batch_share(mask, 2, 1) is mask
    assert batch_share(None, 2, 1) is None

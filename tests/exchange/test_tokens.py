"""Which tokens a rank takes, by direct indexing of one global tensor. Copies compare exactly."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix.exchange.tokens import (
    by_segment,
    chunk_positions,
    from_batch_share,
    in_sequence_order,
    to_batch_share,
)
from megatron_helix.partition.layout import HelixLayout
from tests.distributed import run_distributed

S, B, HIDDEN = 8, 4, 3


def layout_of(m: int, n: int) -> HelixLayout:
    """Any layout of this shape."""
    return HelixLayout(m=m, n=n, num_attention_heads=n, num_query_groups=n, kv_channels=8 * m)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1)])
def test_batch_share_converts_the_stream_and_back(m: int, n: int) -> None:
    layout = layout_of(m, n)
    whole = torch.arange(S * B * HIDDEN, dtype=torch.float32).view(S, B, HIDDEN)

    def inside(rank: int, tensor: torch.Tensor) -> torch.Tensor:
        i, j = layout.coordinates(rank)
        return tensor.chunk(n)[i].chunk(m, dim=1)[j]

    def convert() -> tuple[torch.Tensor, ...]:
        rank = dist.get_rank()
        groups = [dist.new_group(layout.dim_group(i * m)) for i in range(n)]
        dim_group = groups[layout.coordinates(rank)[0]]
        outside = whole.chunk(4)[rank].clone().requires_grad_()
        share = to_batch_share(outside, layout, dim_group)
        share.backward(-inside(rank, whole))
        mine = inside(rank, whole).clone().requires_grad_()
        back = from_batch_share(mine, layout, dim_group)
        back.backward(-whole.chunk(4)[rank])
        return share.detach(), outside.grad, back.detach(), mine.grad

    for rank, (share, share_grad, back, back_grad) in enumerate(run_distributed(convert, 4)):
        assert torch.equal(share, inside(rank, whole))
        assert torch.equal(share_grad, -whole.chunk(4)[rank])
        assert torch.equal(back, whole.chunk(4)[rank])
        assert torch.equal(back_grad, -inside(rank, whole))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_chunks_of_all_segments_are_the_sequence(m: int, n: int, length: int) -> None:
    layout = layout_of(m, n)
    tokens = m * n * length
    positions = [chunk_positions(layout, j, tokens) for j in range(m)]
    sequence = torch.arange(tokens)
    assert torch.equal(torch.cat(positions).sort().values, sequence)
    for j, mine in enumerate(positions):
        assert torch.equal(mine, mine.sort().values)  # ascending, as a causal mask needs
        assert set((mine // length % m).tolist()) == {j}  # chunks j, m + j, 2m + j, ...
    assert torch.equal(by_segment(sequence, layout), torch.stack(positions))
    assert torch.equal(in_sequence_order(torch.cat(positions), layout), sequence)

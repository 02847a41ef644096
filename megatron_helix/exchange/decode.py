"""Decoding: which part of the KV cache a rank of the dim axis keeps, and what moves in a step.

A rank (i, j) caches keys and values of head group i, for 1/m of what there is, so that the ranks of
a tensor-parallel group hold every key and value once, for any T:

* **batch split**: for sequences ``[j * b/m, (j+1) * b/m)``. A step is the ``activations`` exchange.
* **sequence split**: for 1/m of the positions of all sequences. Each rank attends to the positions
  it holds; the partial contexts are merged by their log-sum-exps. This is the exchange
  ``partials``, a step's counterpart of a prefill whose sequence was split.
* ``scores``: for segment j of the head dimension.

Sharded einsums of ``partials`` (one new token for each of b sequences, P positions)::

    qkv[b, K_n, slot, d_m] -> qkv[b, K_n, slot, d]          all-gather over the dim group
    O_j[b, H_n, d], l_j[b, H_n] = attention over P_m        no communication
    O[b, H_n, d_m] = sum_j w_j O_j,  w_j = softmax_j(l_j)   all-to-all over the dim group, in fp32

The merge is exact: with ``l_j`` the log of rank j's softmax denominator, ``exp(l_j - log sum_k exp
l_k)`` is the share that its positions have in the whole denominator.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_helix.exchange.padding import own_channels
from megatron_helix.exchange.tokens import chunk_positions
from megatron_helix.kernels.collectives import all_gather, all_to_all
from megatron_helix.kernels.copies import joined, parted
from megatron_helix.partition.layout import HelixLayout


class SequenceCache(NamedTuple):
    """Keys and values of the positions that one rank of the dim group holds, for one layer.

    Attributes:
        key: ``[P/m, b, K/n, d]``, before rotary embeddings.
        value: like ``key``.
        positions: ``[P/m]``, ascending, on the CPU; row r of the cache is of position r of these.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor

    def held(self, end: int) -> int:
        """How many rows are of positions before ``end``: always the first ones."""
        return int(torch.searchsorted(self.positions, end))

    def write(self, position: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the token at ``position`` if it is this rank's; ``key`` and ``value`` [1, b, .]."""
        row = self.held(position)
        if row < len(self.positions) and int(self.positions[row]) == position:
            self.key[row], self.value[row] = key[0], value[0]


def cached_positions(
    layout: HelixLayout, segment: int, *, prefilled: int, capacity: int, balanced: bool = True
) -> torch.Tensor:
    """Positions that dim rank ``segment`` caches, ``[capacity/m]``, ascending.

    Those it attended for in the prefill, then every m-th: every rank holds as many, however long
    the prompt was.

    Args:
        layout: the partition.
        segment: j.
        prefilled: tokens of the prefill, a multiple of T.
        capacity: positions of the whole cache, a multiple of m.
        balanced: of the prefill's plan.
    """
    later = torch.arange(prefilled, capacity)[segment :: layout.m]
    return torch.cat([chunk_positions(layout, segment, prefilled, balanced=balanced), later])


def qkv_to_every_rank(
    qkv: torch.Tensor, layout: HelixLayout, dim_group: dist.ProcessGroup
) -> torch.Tensor:
    """One segment -> whole heads in canonical order, of all tokens, on all ranks of the group.

    ``[s, b, K/n * slots * d/m] -> [s, b, K/n * slots * d]``.
    """
    heads = layout.num_query_groups // layout.n * layout.slots
    s, b, _ = qkv.shape
    gathered = all_gather(qkv, dim_group)  # [m * s, b, tile]: segment after segment
    tiles = gathered.view(layout.m, s, b, heads, layout.segment_blocks, layout.stored_run)
    return joined(tiles, layout.runs, dim=4).flatten(2)


def attend_to_share(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token a sequence over the positions at hand, and the log of its denominator.

    Args:
        query: ``[1, b, H/n, d]``.
        key: ``[P, b, K/n, d]``; P may be 0.
        value: like ``key``.
        scale: of the softmax.

    Returns:
        Context ``[b, H/n, d]``, and log-sum-exp of the scores ``[b, H/n]``, both in fp32 (or in
        double precision if ``query`` is).
    """
    _, b, heads, channels = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(b, key.size(2), -1, channels)
    scores = torch.einsum("bghd,pbgd->bghp", grouped, key.to(wide)) * scale
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)  # of nothing: -inf
    weights = torch.exp(scores - lse)
    context = torch.einsum("bghp,pbgd->bghd", weights, value.to(wide))
    return context.reshape(b, heads, channels), lse.view(b, heads)


def merge_shares(
    context: torch.Tensor,
    lse: torch.Tensor,
    layout: HelixLayout,
    dim_group: dist.ProcessGroup,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contexts over each rank's positions -> the context over all, one segment of each head.

    Args:
        context: ``[b, H/n, d]``, over this rank's positions.
        lse: ``[b, H/n]``, its log-sum-exp.
        layout: the partition.
        dim_group: the m ranks that hold the positions between them.
        offset: ``[H/n]``, a score that every softmax has beside those of the tokens and that
            carries no value; None for an ordinary softmax.

    Returns:
        ``[1, b, H/n * d/m]``, in tile order, without padding.
    """
    b, heads, _ = context.shape
    m, size = layout.m, layout.segment_size
    whole = context.view(b, heads, layout.segment_blocks, -1)
    segments = parted(whole, layout.runs, dim=3).flatten(3)
    each = lse[None, :, :, None].expand(m, b, heads, 1)
    received = all_to_all(torch.cat([segments, each], dim=-1), dim_group)  # rank k's, my segment
    partial, weight = received.split([size, 1], dim=-1)
    denominators = weight
    if offset is not None:
        extra = offset.to(weight).view(1, 1, heads, 1).expand(1, b, heads, 1)
        denominators = torch.cat([weight, extra])
    share = torch.exp(weight - torch.logsumexp(denominators, dim=0, keepdim=True))
    merged = (share * partial).sum(dim=0).view(1, b, heads * size)
    return own_channels(merged, layout, dim_group.rank())

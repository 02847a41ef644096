"""The ``activations`` exchange: projected tokens move over the dim axis, weights stay.

Every rank projects all tokens onto its tile of the QKV weight. One all-to-all over the dim group then
turns "all tokens, one segment of my heads" into "1/m of the tokens, my heads whole", on which stock
attention runs; a second one turns the context back. Tokens are split by sequence of the batch
(*batch split*): rank (i, j) attends for sequences ``[j * b/m, (j+1) * b/m)``.

Sharded einsum (s tokens a sequence, b sequences, K query groups, slots heads a group, d channels)::

    qkv[s, b, K_n, slot, d_m]  ->  qkv[s, b_m, K_n, slot, d]      all-to-all over the dim group
    context[s, b_m, H_n, d]    ->  context[s, b, H_n, d_m]        all-to-all over the dim group

Elements a rank sends in one forward: ``(m-1)/m * s * b * (slots * K + H) * d / T``; the backward sends
as many.
"""

import torch
import torch.distributed as dist

from megatron_helix.collectives import all_to_all
from megatron_helix.layout import HelixLayout


def qkv_to_whole_heads(
    qkv: torch.Tensor, layout: HelixLayout, dim_group: dist.ProcessGroup
) -> torch.Tensor:
    """``[s, b, K/n * slots * d/m]`` in tile order -> ``[s, b/m, K/n * slots * d]``, canonical order.

    Its dual is :func:`context_to_segments`, up to which heads are packed.
    """
    heads = layout.num_query_groups // layout.n * layout.slots
    m, blocks = layout.m, layout.segment_blocks
    s, b, _ = qkv.shape
    sent = qkv.view(s, m, b // m, -1).transpose(0, 1)  # [m, s, b/m, tile]: chunk j for segment j
    received = all_to_all(sent, dim_group)  # [m, s, b/m, tile]: segment k of every head
    tiles = received.view(m, s, b // m, heads, blocks, layout.segment_size // blocks)
    return tiles.permute(1, 2, 3, 4, 0, 5).reshape(s, b // m, heads * layout.kv_channels)


def context_to_segments(
    context: torch.Tensor, layout: HelixLayout, dim_group: dist.ProcessGroup
) -> torch.Tensor:
    """``[s, b/m, H/n * d]``, canonical order -> ``[s, b, H/n * d/m]`` in tile order."""
    heads = layout.num_attention_heads // layout.n
    m, blocks = layout.m, layout.segment_blocks
    s, b, _ = context.shape
    whole = context.view(s, b, heads, blocks, m, layout.segment_size // blocks)
    sent = whole.permute(4, 0, 1, 2, 3, 5)  # [m, s, b/m, tile]: segment j for rank j
    received = all_to_all(sent.reshape(m, s, b, -1), dim_group)  # chunk k: sequences of rank k
    return received.transpose(0, 1).reshape(s, m * b, -1)


def batch_share(mask: torch.Tensor | None, m: int, segment: int) -> torch.Tensor | None:
    """The part of an attention mask ``[b or 1, 1, s, s]`` for the sequences of this dim rank."""
    if mask is None or mask.size(0) == 1:
        return mask
    return mask.chunk(m, dim=0)[segment]

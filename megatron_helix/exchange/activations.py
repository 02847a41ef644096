"""The ``activations`` exchange: projected tokens move over the dim axis, weights stay.

Every rank projects all tokens onto its tile of the QKV weight. One all-to-all over the dim group
then turns "all tokens, one segment of my heads" into "1/m of the tokens, my heads whole", on which
stock attention runs; a second one turns the context back. Which tokens: see
:mod:`megatron_helix.exchange.tokens`.

Sharded einsum (s tokens a sequence, b sequences, K query groups, slots heads a group, d channels;
the split puts the m over s or over b)::

    qkv[s, b, K_n, slot, d_m]  ->  qkv[(s, b)_m, K_n, slot, d]      all-to-all over the dim group
    context[(s, b)_m, H_n, d]  ->  context[s, b, H_n, d_m]          all-to-all over the dim group

Elements a rank sends in one forward: ``(m-1)/m * s * b * (slots * K + H) * d / T``; the backward
sends as many. Where m does not cut d into equal segments, d is that with padding
(:mod:`megatron_helix.exchange.padding`): all chunks have the size of the largest, so that every
rank sends as much and the collective stays one of equal parts.
"""

import torch
import torch.distributed as dist

from megatron_helix.exchange.tokens import by_segment, in_sequence_order
from megatron_helix.kernels.collectives import all_to_all
from megatron_helix.kernels.copies import joined, packed, parted
from megatron_helix.partition.layout import HelixLayout


def qkv_to_whole_heads(
    qkv: torch.Tensor,
    layout: HelixLayout,
    dim_group: dist.ProcessGroup,
    split: str = "batch",
    documents: tuple[int, ...] = (),
) -> torch.Tensor:
    """Projected tokens of all, one segment -> my tokens, whole heads in canonical order.

    Args:
        qkv: ``[s, b, K/n * slots * d/m]``, in tile order.
        layout: the partition.
        dim_group: the m ranks that exchange.
        split: ``"batch"`` or ``"sequence"``.
        documents: of a packed row, as `Plan` has them.

    Returns:
        ``[s, b/m, K/n * slots * d]`` (batch) or ``[s/m, b, K/n * slots * d]`` (sequence). The dual
        is :func:`context_to_segments`, up to which heads are packed.
    """
    heads = layout.num_query_groups // layout.n * layout.slots
    m, blocks = layout.m, layout.segment_blocks
    s, b, _ = qkv.shape
    if split == "batch":
        sent = qkv.view(s, m, b // m, -1).transpose(0, 1)  # [m, s, b/m, tile]: chunk j for rank j
    else:
        sent = by_segment(qkv, layout, documents=documents)  # [m, s/m, b, tile]
    received = all_to_all(sent, dim_group)  # segment k of every head, for my tokens
    tiles = received.view(*received.shape[:3], heads, blocks, layout.stored_run)
    return joined(tiles, layout.runs, dim=4).flatten(2)


def context_to_segments(
    context: torch.Tensor,
    layout: HelixLayout,
    dim_group: dist.ProcessGroup,
    split: str = "batch",
    documents: tuple[int, ...] = (),
) -> torch.Tensor:
    """My tokens' context, whole heads -> all tokens' context, one segment in tile order.

    ``[s, b/m, H/n * d]`` or ``[s/m, b, H/n * d]`` -> ``[s, b, H/n * d/m]``.
    """
    heads = layout.num_attention_heads // layout.n
    m, tokens = layout.m, context.shape[:2]
    whole = context.view(*tokens, heads, layout.segment_blocks, -1)
    sent = parted(whole, layout.runs, dim=4)  # [m, tokens, tile]: segment j for rank j
    received = all_to_all(sent.flatten(3), dim_group)  # chunk k: tokens of rank k
    if split == "batch":
        return packed(received.transpose(0, 1)).view(tokens[0], m * tokens[1], -1)
    return in_sequence_order(received.flatten(0, 1), layout, documents=documents)

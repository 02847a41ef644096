"""Which tokens a rank of the dim axis takes, and the order of tokens inside the decoder block.

Under sequence parallelism the residual stream is ``[s/T, b, hidden]``: rank t = i * m + j holds
sequence chunk t of T. Attention on whole heads needs whole sequences, for 1/m of the tokens:

* **batch split**: rank (i, j) takes sequences ``[j * b/m, (j+1) * b/m)``. Inside the decoder block
  the stream is kept as ``[s/n, b/m, hidden]``: sequence chunk i of n, for its own sequences. One
  all-to-all over the dim group converts on entry, its inverse on exit; chunks i*m .. i*m + m-1 of
  the m ranks are together chunk i of n.
* **sequence split**: rank (i, j) takes chunks ``j, m + j, 2m + j, ...`` of T of all sequences: what
  an all-gather over the head group yields from the stream as it is. The rank with most of the
  causal triangle, j = m - 1, has ``1 + (m-1)/T`` times the mean of it: twice, nearly, with n = 1.

Elements a rank sends for one conversion: ``(m-1)/m * s * b * hidden / T``.
"""

import torch
import torch.distributed as dist

from megatron_helix.kernels.collectives import all_to_all
from megatron_helix.kernels.copies import packed
from megatron_helix.partition.layout import HelixLayout


def to_batch_share(
    hidden: torch.Tensor, layout: HelixLayout, dim_group: dist.ProcessGroup
) -> torch.Tensor:
    """``[s/T, b, hidden] -> [s/n, b/m, hidden]``; its dual is :func:`from_batch_share`."""
    chunk, b, width = hidden.shape
    sent = hidden.view(chunk, layout.m, b // layout.m, width).transpose(0, 1)
    received = all_to_all(sent, dim_group)  # [m, s/T, b/m, hidden]: chunk k of my sequences
    return received.view(layout.m * chunk, b // layout.m, width)


def from_batch_share(
    hidden: torch.Tensor, layout: HelixLayout, dim_group: dist.ProcessGroup
) -> torch.Tensor:
    """``[s/n, b/m, hidden] -> [s/T, b, hidden]``; its dual is :func:`to_batch_share`."""
    rows, share, width = hidden.shape
    sent = hidden.view(layout.m, rows // layout.m, share, width)
    received = all_to_all(sent, dim_group)  # [m, s/T, b/m, hidden]: my chunk of rank k's sequences
    return packed(received.transpose(0, 1)).view(rows // layout.m, layout.m * share, width)


def chunk_positions(layout: HelixLayout, segment: int, sequence: int) -> torch.Tensor:
    """Positions in the sequence of the tokens of dim rank ``segment``, ``[s/m]``, ascending."""
    chunks = torch.arange(sequence).view(layout.n, layout.m, sequence // layout.size)
    return chunks[:, segment].reshape(-1)


def in_sequence_order(gathered: torch.Tensor, layout: HelixLayout) -> torch.Tensor:
    """What an all-gather over the dim group makes of the chunks, put in order.

    ``[m * s/m, ...]`` (rank after rank, each its n chunks) -> ``[s, ...]``.
    """
    chunks = gathered.view(layout.m, layout.n, -1, *gathered.shape[1:])
    return packed(chunks.transpose(0, 1)).view(gathered.shape)


def by_segment(x: torch.Tensor, layout: HelixLayout) -> torch.Tensor:
    """``[s, ...] -> [m, s/m, ...]``, dim rank by dim rank; undoes `in_sequence_order`."""
    chunks = x.view(layout.n, layout.m, -1, *x.shape[1:])
    return packed(chunks.transpose(0, 1)).view(layout.m, -1, *x.shape[1:])

"""Attention weights as the ranks of a tensor-parallel group store them, and back.

The order is a layout's, :meth:`megatron_helix.partition.layout.HelixLayout.qkv_rows` or
``proj_columns``: the canonical index of every stored one. What pads a tile is zero.
"""

import torch

from megatron_helix.partition.layout import PADDING


def stored(whole: torch.Tensor, order: torch.Tensor, axis: int) -> torch.Tensor:
    """A canonical weight in the order it is stored in.

    Args:
        whole: the weight.
        order: of all tiles, or of one.
        axis: that is cut.
    """
    order = order.to(whole.device)
    tiles = whole.index_select(axis, order.clamp(min=0))
    padding = (order == PADDING).nonzero().squeeze(1)
    return tiles.index_fill_(axis, padding, 0) if len(padding) else tiles


def canonical(tiles: torch.Tensor, order: torch.Tensor, axis: int) -> torch.Tensor:
    """Undoes :func:`stored` of all tiles; what stands in the padding is left away."""
    order = order.to(tiles.device)
    kept = (order != PADDING).nonzero().squeeze(1)
    return tiles.index_select(axis, kept[order[kept].argsort()])

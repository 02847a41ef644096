"""What pads the tiles of smaller segments: where it is left away, and why it stays zero.

Where m does not cut the head dimension into equal segments, a smaller one is stored in the size of
the largest (:mod:`megatron_helix.partition.layout`): it has rows of W_q, W_k, W_v, of gates and of
their biases, and columns of W_o, that belong to no channel. They are zero when they are drawn or
loaded. Core attention, norms, rotary embeddings and gates see real channels alone, under every
exchange, so that nothing they compute depends on padding.

The gradient of padding is exactly zero.

* ``activations``, ``scores`` and decode steps: what the QKV linear puts out for it is left away,
  here or by :func:`megatron_helix.kernels.copies.joined`, whose backward passes give it a gradient
  of zeros. Those of its weight and bias are sums of products with these zeros. For the output
  linear the context has zeros in its place, so that the gradient of a padded column of W_o is a sum
  of products with zeros, too.
* ``weights``: the gathered weight is joined without padding; its gradient is parted with zeros.

Then padding stays zero. A product of zero with finite numbers, a sum of zeros, and what is scaled,
clipped, accumulated or reduced of them is zero; a step with a gradient that is not finite is left
out where losses are scaled, and spoils every weight elsewhere. Momentum, first and second moments
begin as zero and stay so; Adam's update is ``0 / (sqrt(0) + eps)``; weight decay takes a part of
zero away. Zeros add nothing to the norms of gradients and parameters. (Only ``--adam-eps 0``, which
divides by them, and a count of the zeros are refused.)
"""

import torch

from megatron_helix.partition.layout import HelixLayout


def own_channels(tiles: torch.Tensor, layout: HelixLayout, segment: int) -> torch.Tensor:
    """``[..., heads * tile] -> [..., heads * d/m]``: what a rank projects, without padding."""
    own, stored = layout.runs[segment], layout.stored_run
    if own == stored:
        return tiles
    return tiles.unflatten(-1, (-1, stored))[..., :own].flatten(-2)


def own_tiles(channels: torch.Tensor, layout: HelixLayout, segment: int) -> torch.Tensor:
    """Undoes :func:`own_channels`: zeros for padding, as the output linear takes them."""
    own, stored = layout.runs[segment], layout.stored_run
    if own == stored:
        return channels
    runs = channels.unflatten(-1, (-1, own))
    return torch.nn.functional.pad(runs, (0, stored - own)).flatten(-2)

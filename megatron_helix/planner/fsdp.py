"""Fully sharded data parallelism: which weights are gathered when, and whose gradients scattered.

A *unit* is a module whose weights one collective gathers, and whose gradients another scatters,
over the data-parallel ranks, context-parallel ones with them; p of them keep 1/p each. Every
micro-batch gathers a layer's weights for its forward pass and, since they are given up after it,
for its backward pass; then the gradients are reduce-scattered, and added up as shards. Gradients go
in the precision of the weights, in bf16 as well, unless Megatron FSDP is told another one.

==================  ==========================================  ===================================
of                  torch FSDP2                                 Megatron FSDP
==================  ==========================================  ===================================
units               embedding, each layer, the rest             each layer, buckets of the rest
outside the layers  as a layer                                  gathered once a step, and kept until
                                                                the optimizer has changed it
padding             rows of every tensor, to a multiple of p    a unit, to p times whole rows of all
==================  ==========================================  ===================================

Sources: ``torch/distributed/fsdp/_fully_shard`` (torch 2.13, ``reshard_after_forward``) as
``megatron/core/distributed/torch_fully_sharded_data_parallel.py`` calls it, and
``megatron/core/distributed/fsdp`` (megatron-core 0.19, strategy ``optim_grads_params``). Both are
held against the ledger on CPU ranks; 98 all-gathers a step of 12 layers and four micro-batches,
measured on two GPUs, are Megatron FSDP's 4 x 12 x 2 and two outside the layers.
"""

import math

from megatron_helix.planner import parameters
from megatron_helix.planner.book import Book, share
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.parameters import Shapes

AHEAD = 500_000_000  # elements that Megatron FSDP gathers ahead, and a layer at least
BUCKET = 40_000_000  # elements that close a bucket outside the layers


def weights(book: Book, first: bool, last: bool) -> None:
    """Weights in, gradients out, of a rank of a stage that is ``first`` or ``last`` or neither."""
    here = book.here
    before, after = parameters.end_shapes(here, first, last)
    for axis, shapes in zip(("dp", "expert_dp"), layer_units(here), strict=True):
        _unit(book, axis, shapes, here.layers)
    megatrons = here.layout.fsdp == "megatron_fsdp"
    for shapes in _buckets(here, before + after) if megatrons else (before, after):
        _unit(book, "dp", shapes, 1, stays=megatrons)
    if megatrons and here.phase != "train":
        again = min(here.layers, _ahead(here))
        for axis, shapes in zip(("dp", "expert_dp"), layer_units(here), strict=True):
            _once(book, axis, shapes, again)


def _buckets(here: Deployment, shapes: Shapes) -> list[Shapes]:
    """What Megatron FSDP has together of what lies outside the layers, in its order."""
    buckets: list[Shapes] = [[]]
    for shape in shapes:
        buckets[-1].append(shape)
        if sum(rows * columns for rows, columns in buckets[-1]) >= max(BUCKET, 1e6 * here.replicas):
            buckets.append([])
    return buckets


def _once(book: Book, axis: str, shapes: Shapes, units: int) -> None:
    """Units that a step gathers once, whatever its micro-batches."""
    ranks, _ = book.groups[axis]
    if shapes:
        one = shard_size(book.here, shapes, ranks) * book.here.element_bytes
        when = "step" if book.here.phase == "train" else "forward"
        sent = units * round(one * share("all_gather", ranks))
        book.sent("weights", axis, "all_gather", when, sent, units, "weights")


def _ahead(here: Deployment) -> int:
    """Layers that Megatron FSDP gathers ahead of what follows the last one: the first ones again.

    A backward pass finds them there; a forward pass alone, the next one, and after the last
    micro-batch nobody.
    """
    dense, experts = layer_units(here)
    layer = sum(rows * columns for rows, columns in dense + experts)
    return math.ceil(max(AHEAD, layer) / layer)


def layer_units(here: Deployment) -> tuple[Shapes, Shapes]:
    """Shapes of a layer's units, over data-parallel ranks and over those of experts."""
    layer, experts = parameters.layer_shapes(here), parameters.expert_shapes(here)
    return (layer, experts) if here.experts_apart else (layer + experts, [])


def _unit(book: Book, axis: str, shapes: Shapes, units: int, *, stays: bool = False) -> None:
    """Units of these shapes; ``stays`` if their weights are kept from one gather to the next."""
    if not shapes:
        return
    ranks, _ = book.groups[axis]
    shard = shard_size(book.here, shapes, ranks)
    if stays:
        _once(book, axis, shapes, units)
    else:
        book.call("weights", axis, "all_gather", "forward", shard, units, beside="weights")
        book.call("weights", axis, "all_gather", "backward", shard, units, beside="weights")
    width, beside = book.here.sent_gradient_bytes, "gradients"
    book.call("gradients", axis, "reduce_scatter", "backward", shard, units, width, beside)


def shard_size(here: Deployment, shapes: Shapes, ranks: int) -> float:
    """Elements of a rank's shard of a unit, with its padding."""
    if here.layout.fsdp == "torch_fsdp2":
        return sum(-(-rows // ranks) * columns for rows, columns in shapes)
    chunk = _chunk(shapes)
    return -(-sum(rows * columns for rows, columns in shapes) // (ranks * chunk)) * chunk


def _chunk(shapes: Shapes) -> int:
    """What a shard of Megatron FSDP's is a multiple of: whole rows of every tensor, if it can be.

    Tensors with long rows first; one that is shorter than a chunk may be cut anywhere.
    """
    chunk = 1
    for rows, columns in sorted(shapes, key=lambda shape: shape[1], reverse=True):
        whole = chunk % columns == 0 and rows * columns % chunk == 0
        if not whole and rows * columns >= chunk:
            chunk = math.lcm(chunk, columns)
    return chunk


def gathered_bytes(here: Deployment, stage: int) -> float:
    """Memory of what is not a rank's own, at the highest point: when the backward pass begins.

    The weights of the layer at work, and of the next one that are on their way. What Megatron FSDP
    gathers outside the layers stays, and in training it holds a layer's gradients in the buffer
    that they are scattered from; torch FSDP2 has them once it has given up as many activations.
    """
    shapes = [*parameters.layer_shapes(here), *parameters.expert_shapes(here)]
    layer = sum(rows * columns for rows, columns in shapes)
    if here.layout.fsdp == "torch_fsdp2":
        return 2 * layer * here.element_bytes
    ends = parameters.end_shapes(here, stage == 0, stage == here.stages - 1)
    stays = sum(rows * columns for shapes in ends for rows, columns in shapes)
    buffer = layer * here.sent_gradient_bytes if here.phase == "train" else 0
    return (2 * layer + stays) * here.element_bytes + buffer

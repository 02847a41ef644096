"""The collectives that come once a step: gradients, weights that follow them, single numbers."""

import math
from collections import Counter

from megatron_helix.planner import fsdp, parameters
from megatron_helix.planner.book import FP32, INT32, Book


def gradients(book: Book, first: bool, last: bool, *, leads: bool, trails: bool) -> None:
    """Gradients over replicas, over T where a rank saw 1/T of the tokens, of tied weights.

    Args:
        book: of the rank.
        first: whether its stage is the first one.
        last: whether it is the last one.
        leads: whether the rank is of the first data-parallel replica.
        trails: of the last one; Megatron FSDP has short tensors at the end of a unit.
    """
    here, layout = book.here, book.here.layout
    tensors = parameters.dense_tensors(here, first, last)
    experts = parameters.expert_tensors(here)
    if not here.experts_apart:
        tensors, experts = tensors + experts, []
    untied = here.model.untie_embeddings_and_output_weights
    if layout.fsdp:
        tensors, experts = [], []  # :mod:`megatron_helix.planner.fsdp` has them
    if not layout.distributed_optimizer:
        _replicated(book, "dp", tensors)
    else:
        tied = here.stages > 1 and (first or last) and not untied
        table = tensors[:1] if tied else []  # a bucket of its own
        for bucket in (table, tensors[len(table) :]):
            _distributed(book, "dp", bucket)
    if experts and not layout.distributed_optimizer:
        _replicated(book, "expert_dp", experts)
    elif experts:
        _distributed(book, "expert_dp", experts)
    if here.sequence_parallel:
        unsplit = parameters.sequence_parallel(here, last)
        size, width = sum(rows * columns for rows, columns in unsplit), here.gradient_bytes
        if layout.fsdp != "megatron_fsdp" or trails:
            book.call("gradients of norms", "tp", "all_reduce", "step", size, size=width)
        if layout.fsdp == "torch_fsdp2" and leads:  # cut into shards again, one by one
            for shape, count in Counter(unsplit).items():
                shard = fsdp.shard_size(here, [shape], here.replicas)
                book.call("gradients of norms", "dp", "scatter", "step", shard, count, width)
    if layout.gtp > 1:
        whole = parameters.whole_beside_shards(here, first, last)
        what, width = "gradients of norms", here.gradient_bytes
        book.call(what, "gtp", "all_reduce", "step", whole, size=width)
    if here.stages > 1 and (first or last) and not untied:
        table = here.vocabulary * here.model.hidden_size / here.tp
        what, width = "gradient of the tied embedding", here.gradient_bytes
        book.call(what, "embedding", "all_reduce", "step", table, size=width)


def _replicated(book: Book, axis: str, tensors: list[int]) -> None:
    here = book.here
    if tensors:
        beside = "replicas" if here.layout.overlap_dp else None
        size = here.gradient_bytes
        book.call("gradients", axis, "all_reduce", "step", sum(tensors), size=size, beside=beside)


def _distributed(book: Book, axis: str, tensors: list[int]) -> None:
    """Gradients out and weights back, of a bucket padded as Megatron pads it."""
    ranks, _ = book.groups[axis]
    if not tensors:
        return
    unit = math.lcm(ranks, 128)
    padded = sum(-(-size // 64) * 64 for size in tensors)
    shard, width = -(-padded // unit) * unit // ranks, book.here.gradient_bytes
    beside = "replicas" if book.here.layout.overlap_dp else None
    book.call("gradients", axis, "reduce_scatter", "step", shard, size=width, beside=beside)
    # Dense weights and experts have an optimizer each, and each of the two gathers all weights.
    gathers = 2 if book.here.experts_apart else 1
    book.call("weights", axis, "all_gather", "step", shard, gathers, beside=beside)


def numbers(book: Book, last: bool) -> None:
    """Loss, gradient norm and other single numbers."""
    here = book.here
    what = "loss, gradient norm"
    if last:
        shared = "dp_gtp" if here.layout.gtp > 1 else "dp"
        book.call(what, shared, "all_reduce", "step", 2, size=FP32)
    scaled = here.precision == "fp16"  # each optimizer asks its ranks for overflows
    apart = here.experts_apart
    if here.layout.fsdp == "torch_fsdp2":  # the norm of a rank's shards
        book.call("norm of shards", "dp", "all_reduce", "step", 1, size=FP32)
    if here.layout.distributed_optimizer or here.layout.fsdp == "megatron_fsdp":
        book.call(what, "optimizer", "all_reduce", "step", 1, 1 + scaled * (1 + apart), FP32)
        book.call(what, "model", "all_reduce", "step", 1, 2, FP32)
    else:
        book.call(what, "model", "all_reduce", "step", 1, 3 + scaled, FP32)
        if apart:
            book.call(what, "expert_model", "all_reduce", "step", 1, 1 + scaled, FP32)
    book.call(what, "world", "all_reduce", "step", 1, size=INT32)

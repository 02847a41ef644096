"""CUDA graphs beside a partition: which exchange may be captured by whom.

A graph replays the kernels of one pass on the memory of that pass. Whole iterations hold forward,
backward and every collective between them in their order, so what begins in one layer and ends in
another replays as it ran. Graphs of single layers do not: under ``weights`` a layer begins the
gathers of the next one and the stream is in an order of its own, so only ``activations``, whose
exchanges begin and end inside a layer, can be cut at a layer's ends.

A parameter's hook runs while a layer is captured, and under TransformerEngine's graphs again when
what they return is added up. A softmax offset, whose gradient a hook sums over the dim group, would
be summed twice.
"""

import argparse
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice
from megatron_helix.options.features.captured import BY_LAYER, CAPTURED, FAILED

_LEAVE = "or leave --cuda-graph-impl away"


def require_graphs(args: argparse.Namespace, asked: Choice, config: Any) -> None:
    """Check that what a run captures can be replayed, with m > 1.

    Args:
        args: Megatron's arguments.
        asked: how the run exchanges.
        config: a ``TransformerConfig``.

    Raises:
        UserError: naming the flag, the reason and the remedy.
    """
    impl = config.cuda_graph_impl
    if impl == "none":
        return
    exchanges = CAPTURED.get(impl, ())
    if not exchanges:
        raise UserError(
            f"--cuda-graph-impl: {impl} has not captured helix's exchanges with stock's numbers;"
            f" use one of {', '.join(name for name in CAPTURED if CAPTURED[name]) or 'none'},"
            f" {_LEAVE}"
        )
    if asked.exchange not in exchanges:
        seen = FAILED.get((impl, asked.exchange), "and nothing else has been captured there")
        raise UserError(
            f"--helix-exchange: must be {' or '.join(exchanges)} under --cuda-graph-impl {impl},"
            f" got {asked.exchange}, {seen}; use that, {_LEAVE}"
        )
    if impl in BY_LAYER and asked.split != "batch":
        raise UserError(
            f"--helix-split: must be batch under --cuda-graph-impl {impl}, of which no other has"
            f" been run, got {asked.split}; use batch, {_LEAVE}"
        )
    if impl != "local" and not config.cuda_graph_warmup_steps:
        raise UserError(
            "--cuda-graph-warmup-steps: must be 1 or more, since the first collective of a process"
            f" group cannot be captured, got 0; use more, {_LEAVE}"
        )
    for flag, value, reason in _not_captured(args, asked, config):
        raise UserError(f"{flag}: {reason}, got {value}; leave it away, {_LEAVE}")


def _not_captured(args: argparse.Namespace, asked: Choice, config: Any) -> Any:
    """Flags of what is not captured: the flag, its value, why."""
    if config.cuda_graph_impl in BY_LAYER and config.softmax_type == "learnable":
        yield (
            "--softmax-type",
            "learnable",
            "the hook that sums an offset's gradient is captured with a layer and may run again",
        )
    for flag, packs in (
        ("--sft", getattr(args, "sft", False)),
        (
            "--dataloader-inter-document-masking",
            getattr(args, "dataloader_inter_document_masking", False),
        ),
    ):
        if packs:
            yield flag, "packed rows", "documents are of other lengths in every replay"
    not_run = "it has not been run under --cuda-graph-impl beside helix"
    if asked.gather != "microbatch":
        yield "--helix-gather", asked.gather, not_run
    if config.cuda_graph_modules:
        modules = " ".join(module.name for module in config.cuda_graph_modules)
        yield "--cuda-graph-modules", modules, "parts of layers have not been captured beside helix"
    if config.fp8:
        yield "--fp8-format", config.fp8, not_run
    if config.num_moe_experts:
        yield "--num-experts", config.num_moe_experts, not_run
    if config.recompute_granularity:
        yield "--recompute-granularity", config.recompute_granularity, not_run
    for flag, size in (
        ("--pipeline-model-parallel-size", config.pipeline_model_parallel_size),
        ("--context-parallel-size", config.context_parallel_size),
    ):
        if size > 1:
            yield flag, size, not_run

"""The one call that turns helix on for a Megatron run."""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_helix.layers import vocabulary
from megatron_helix.layers.layer_spec import (
    helixify,
    swap_norms,
    with_core_attention,
    with_document_attention,
    with_padded_features,
    with_sequence_parallel_norms,
)
from megatron_helix.layers.linear import link
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.options import arguments, core_attention, machine, parsed
from megatron_helix.options.uneven import uneven
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.run_config.core_attention import OWN
from megatron_helix.upstream import checkpoint_reader, cpu_device, initial_weights, patches


def enable(
    args: argparse.Namespace, model_config: GPTModelConfig, *, training: bool = True
) -> GPTModelConfig:
    """Make ``model_config`` build its layers with attention cut ``--helix-m`` x ``--helix-n``.

    Everything that cannot run beside helix is refused here, whatever asked for it.

    Args:
        args: Megatron's validated arguments, with the helix flags.
        model_config: the model config made from them. Its layer spec (given by ``--spec`` or
            Megatron's default) is kept, with its self-attention swapped. Without a layout only the
            torch norms are exchanged for ones that allow sequence parallelism, and core attention:
            where ``--helix-core-attention`` says so, and the local one for one that takes packed
            documents. With one the fastest core attention is taken where nothing is said.
        training: whether micro-batches of the arguments' size will be trained on.

    Returns:
        The same ``model_config``.

    Raises:
        ValueError: for what cannot run beside helix; names flag or field, reason and remedy.
    """
    patches.require_supported_megatron()
    patches.load_into_torch_adam()
    base = model_config.transformer_layer_spec or default_layer_spec
    layout = None
    if arguments.wants_helix(args):
        layout = parsed.require_run(args, model_config, training=training)
        padded = uneven(model_config.transformer)
        _prepare_checkpoints(args, canonical=layout.m > 1 or bool(padded))
        for said in (*_said(layout), *padded):
            if args.rank == 0:
                print(said, flush=True)

    on_cpu = cpu_device.is_enabled()
    core_attention.require_core_attention(args, on_cpu)
    core, why = core_attention.chosen(args, model_config, on_cpu=on_cpu, training=training)
    args.helix_core_attention = core  # from here on
    if core in OWN and not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False  # it would be read in vain
    asked = arguments.choice(args, machine.chosen(args, on_cpu=on_cpu))
    if why and args.rank == 0:
        print(why, flush=True)

    def helix(spec: Any) -> Any:
        spec = with_document_attention(with_core_attention(spec, core))
        if layout is None:
            return spec
        return helixify(spec, layout, asked) if layout.m > 1 else with_padded_features(spec)

    def stock_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        if isinstance(base, ModuleSpec) or not callable(base):
            return base
        takes_stage = "vp_stage" in inspect.signature(base).parameters  # as Megatron asks
        return base(config, vp_stage=vp_stage) if takes_stage else base(config)

    def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        spec = stock_spec(config, vp_stage)
        return with_sequence_parallel_norms(helix(spec), config.transformer, vp_stage)

    if args.spec is not None:
        _refuse_early(stock_spec, helix, model_config)
    model_config.transformer_layer_spec = layer_spec
    transformer = model_config.transformer
    patches.map_mtp_spec(
        stock_spec, lambda spec: swap_norms(helix(spec), transformer) if spec else spec
    )
    if args.helix_initial_weights:
        start = partial(initial_weights.load, args.helix_initial_weights)
        model_config.pre_wrap_hooks.append(start)
    if args.use_cpu_initialization:
        # Megatron's model builder leaves weights that were drawn on the CPU there.
        model_config.pre_wrap_hooks.append(lambda model: [chunk.cuda() for chunk in model])
    if arguments.wants_helix(args):
        early, later = not args.overlap_param_gather, not args.overlap_grad_reduce
        linked = partial(link, forward_early=early, sums_later=later)
        model_config.pre_wrap_hooks += [vocabulary.extend, linked]
        transformer.finalize_model_grads_func = _finalize_model_grads(
            transformer.finalize_model_grads_func or finalize_model_grads
        )
    return model_config


def _said(layout: HelixLayout) -> list[str]:
    """What there is to say of a cut itself."""
    if layout.m == 1:
        return [f"helix 1x{layout.n}: the heads divide; this is plain tensor parallelism"]
    if not layout.waste:
        return []
    return [
        f"helix {layout.m}x{layout.n}: heads of {layout.kv_channels} channels are stored as"
        f" {layout.m} segments of {layout.segment_size}; padding adds {layout.waste:.1%} to the"
        " attention weights"
    ]


def _prepare_checkpoints(args: argparse.Namespace, *, canonical: bool) -> None:
    checkpoint_reader.read_tensors_once()
    if canonical and args.use_distributed_optimizer:
        # Megatron's default keeps optimizer state in the order of a rank's memory.
        args.dist_ckpt_optim_fully_reshardable = True


def _refuse_early(make: Any, helix: Any, model_config: GPTModelConfig) -> None:
    """Refuse a user's spec before there are process groups, if it can be made without them.

    One that asks for its pipeline stage cannot, and is refused where the model is built.
    """
    try:
        spec = make(model_config)
    except Exception:  # whatever it is, it comes again there
        return
    helix(spec)


def _finalize_model_grads(finalize_model_grads: Callable[..., Any]) -> Callable[..., None]:
    """Megatron's own, or the user's, after what helix has to do at the end of a step."""

    def finalize(model: list[torch.nn.Module], *of_megatron: Any, **named: Any) -> None:
        finish_step(model)
        finalize_model_grads(model, *of_megatron, **named)

    return finalize

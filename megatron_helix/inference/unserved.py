"""Models and layouts that generation cannot serve: each is refused in one line, by name."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice, cache_split
from megatron_helix.options import arguments


@dataclass(frozen=True, kw_only=True)
class Unserved:
    """What a model was trained with that it cannot be served with.

    Attributes:
        name: of the argument.
        flag: that sets it.
        reason: why.
        remedy: what to do instead.
        when: whether a value other than None and False is such a one; all are, unless said.
    """

    name: str
    flag: str
    reason: str
    remedy: str = "generate with Megatron's own tools"
    when: Callable[[Any], bool] = lambda value: True


_TRAINED = "the model was trained with"
_QUANTIZED: dict[str, Any] = {
    "reason": "products of low precision need shapes that single tokens do not have",
    "remedy": "serve it in the precision of its weights with --bf16 or --fp16 behind the --",
}
# Of the run, so that it is asked of the saved arguments; not where --bf16 or --fp16 is given.
QUANTIZED = (
    Unserved(name="fp8", flag="--fp8-format", **_QUANTIZED),
    Unserved(name="fp4", flag="--fp4-format", **_QUANTIZED),
    Unserved(name="te_precision_config_file", flag="--te-precision-config-file", **_QUANTIZED),
    Unserved(name="kitchen_config_file", flag="--kitchen-config-file", **_QUANTIZED),
    Unserved(name="kitchen_recipe_number", flag="--kitchen-recipe-number", **_QUANTIZED),
)

_FUSED = "the order of its gates is known to fused kernels only, which steps do not run"
_GPT = "only Megatron's GPT model is built, all its layers alike"
_RANDOM = "its tokens go to random experts, in a benchmark"
_IMAGES = "prompts are text, and its positions and tokens are those of images as well"
MODELS = (
    Unserved(name="hybrid_layer_pattern", flag="--hybrid-layer-pattern", reason=_GPT),
    Unserved(
        name="heterogeneous_layers_config_path",
        flag="--heterogeneous-layers-config-path",
        reason=_GPT,
    ),
    Unserved(
        name="experimental_attention_variant",
        flag="--experimental-attention-variant",
        reason="the cache is one of keys and values",
    ),
    Unserved(
        name="multi_latent_attention",
        flag="--multi-latent-attention",
        reason="its latents have not been tried in the cache",
    ),
    Unserved(
        name="yaml_cfg",
        flag="--yaml-cfg",
        reason="a model that a YAML file describes is not in the checkpoint's arguments",
    ),
    Unserved(
        name="position_embedding_type",
        flag="--position-embedding-type",
        reason=_IMAGES,
        when=lambda kind: kind == "mrope",
    ),
    Unserved(
        name="tokenizer_type",
        flag="--tokenizer-type",
        reason=_IMAGES,
        when=lambda kind: "Multimodal" in kind,
    ),
    Unserved(
        name="window_size",
        flag="--window-size",
        reason="a window has to begin before the token and to end at it",
        remedy="a left side of -1 is no window at all: train on without it",
        when=lambda window: window[0] < 0 or window[1] > 0,
    ),
    Unserved(
        name="moe_router_force_load_balancing",
        flag="--moe-router-force-load-balancing",
        reason=_RANDOM,
    ),
    Unserved(name="moe_router_force_biased", flag="--moe-router-force-biased", reason=_RANDOM),
    Unserved(
        name="moe_mlp_glu_interleave_size", flag="--moe-mlp-glu-interleave-size", reason=_FUSED
    ),
    Unserved(
        name="moe_shared_expert_glu_interleave_size",
        flag="--moe-shared-expert-glu-interleave-size",
        reason=_FUSED,
    ),
    Unserved(
        name="moe_expert_capacity_factor",
        flag="--moe-expert-capacity-factor",
        reason="which tokens an expert drops depends on all that are there, in a step on others"
        " than in training",
        remedy="serve it without dropping with --moe-expert-capacity-factor -1 behind the --",
        when=lambda factor: factor >= 0,
    ),
)

_GPU: dict[str, Any] = {
    "reason": "Megatron's layers without TransformerEngine have no such thing",
    "remedy": "serve it on a GPU",
}
ON_A_CPU = (
    Unserved(name="layernorm_zero_centered_gamma", flag="--apply-layernorm-1p", **_GPU),
    Unserved(name="moe_latent_size", flag="--moe-latent-size", **_GPU),
)

# By the layout that is asked for.
LAYOUTS = (
    Unserved(
        name="context_parallel_size",
        flag="--context-parallel-size",
        reason="a step is one token, which cannot be cut",
        remedy="leave it away",
        when=lambda size: size > 1,
    ),
    *(
        Unserved(
            name=flag.strip("-").replace("-", "_"),
            flag=flag,
            reason="a rank serves one stage of the pipeline",
            remedy="leave it away",
        )
        for flag in (
            "--num-layers-per-virtual-pipeline-stage",
            "--num-virtual-stages-per-pipeline-rank",
        )
    ),
)

# By what a training has beside them, in which a rollout is to be made.
_SHARDED: dict[str, Any] = {
    "reason": "every step would gather all weights from the data-parallel ranks",
    "remedy": "use --use-distributed-optimizer, or generate from a checkpoint",
}
LIVE = (
    Unserved(name="use_megatron_fsdp", flag="--use-megatron-fsdp", **_SHARDED),
    Unserved(name="use_torch_fsdp2", flag="--use-torch-fsdp2", **_SHARDED),
    Unserved(
        name="virtual_pipeline_model_parallel_size",
        flag="--pipeline-model-parallel-layout",
        reason="a rank serves one stage of the pipeline",
        remedy="use a layout of one stage a rank",
    ),
    Unserved(
        name="cuda_graph_impl",
        flag="--cuda-graph-impl",
        reason="graphs are of the shapes that are trained on",
        remedy="leave it away, or generate from a checkpoint",
        when=lambda kind: kind != "none",
    ),
    Unserved(
        name="flash_decode",
        flag="--flash-decode",
        reason="steps attend as training does",
        remedy="leave it away",
    ),
)
_FROM_A_CHECKPOINT = "save it, and generate from the checkpoint with helix generate"


def require_live(args: argparse.Namespace, *, on_cpu: bool) -> None:
    """Check that a model can be rolled out where it is trained.

    Args:
        args: of the training.
        on_cpu: whether it is trained there.

    Raises:
        UserError: for what cannot be served, naming flag, reason and remedy.
    """
    for row in (*MODELS, *(ON_A_CPU if on_cpu else ())):
        _refuse(row, args, _TRAINED)
    for row in QUANTIZED:
        _refuse(replace(row, remedy=_FROM_A_CHECKPOINT), args, _TRAINED)
    for row in (*LAYOUTS, *LIVE):
        _refuse(row, args, "the training has")
    if not args.num_experts:
        return
    if args.moe_token_dispatcher_type != "alltoall":
        raise UserError(
            "--moe-token-dispatcher-type: must be alltoall to generate while training, got"
            f" {args.moe_token_dispatcher_type}; train with it, or {_FROM_A_CHECKPOINT}"
        )
    size = args.tensor_model_parallel_size
    experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or size)
    if experts > size:
        raise UserError(
            "--expert-model-parallel-size: must keep the experts within a tensor-parallel group to"
            " generate while training, for replicas generate apart, got"
            f" {experts} expert ranks and --tensor-model-parallel-size {size}; use fewer, or"
            f" {_FROM_A_CHECKPOINT}"
        )


def require_split(args: argparse.Namespace, batch: int) -> None:
    """Refuse a cache split or an exchange that a micro-batch of ``batch`` prompts cannot have.

    Raises:
        UserError: naming the flag.
    """
    if not arguments.wants_helix(args) or args.helix_m == 1:
        return
    choice = Choice(exchange=args.helix_exchange, split=args.helix_split)
    heads = args.num_attention_heads
    layout = arguments.layout(
        args,
        num_attention_heads=heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        kv_channels=args.kv_channels,
    )
    cache_split(choice, layout, batch)
    if choice.exchange == "weights" and not args.sequence_parallel:
        raise UserError(
            "--helix-exchange: weights needs --sequence-parallel for the prefill, which is not set;"
            " add it, or use --helix-exchange activations"
        )


def require_served(
    args: argparse.Namespace, saved: argparse.Namespace, flags: Sequence[str], *, on_cpu: bool
) -> None:
    """Check that a model can be served under a layout.

    Args:
        args: the model's and the layout's arguments, parsed.
        saved: those that the checkpoint was saved with.
        flags: the user's.
        on_cpu: whether it is to be served there.

    Raises:
        UserError: for what cannot be served, naming flag, reason and remedy.
    """
    for unserved in (*MODELS, *(ON_A_CPU if on_cpu else ())):
        _refuse(unserved, args, _TRAINED)
    if not {"--fp16", "--bf16"} & set(flags):
        for unserved in QUANTIZED:
            _refuse(unserved, saved, _TRAINED)
    for unserved in LAYOUTS:
        _refuse(unserved, args, "the layout has")
    local = on_cpu or args.transformer_impl == "local"
    if args.qk_l2_norm and local != (saved.transformer_impl == "local"):
        raise UserError(
            "--qk-l2-norm: must be served by the layers that it was trained with, for Megatron's"
            " local ones pass over it where there are no experts, and those of training are"
            f" {saved.transformer_impl}; serve it with --transformer-impl {saved.transformer_impl}"
            " behind the --, TransformerEngine's on a GPU"
        )
    stages = args.pipeline_model_parallel_size
    asked = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    uneven = any(getattr(args, name) for name in (*asked, "pipeline_model_parallel_layout"))
    if args.num_layers % stages and not uneven:
        raise UserError(
            f"--pipeline-model-parallel-size: must divide the model's {args.num_layers} layers, got"
            f" {stages}; use another, or say with --decoder-last-pipeline-num-layers how many the"
            " last stage has"
        )


def _refuse(unserved: Unserved, args: argparse.Namespace, what: str) -> None:
    value = getattr(args, unserved.name, None)
    if value is None or value is False or not unserved.when(value):
        return
    raise UserError(
        f"{unserved.flag}: cannot generate, {what} {value}: {unserved.reason}; {unserved.remedy}"
    )

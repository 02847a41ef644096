"""A checkpoint's model: the flags that build it again, and the weights, under any layout.

Not by Megatron's ``--use-checkpoint-args``. That leaves out some of what makes a model (in 0.19:
``--qk-layernorm``, ``--attention-output-gate``, ``--softmax-type``, ``--window-size``, the norm's
epsilon, the scaling of rotary embeddings, a byte-level tokenizer's vocabulary), silently where the
user does not repeat it; and it reads the heads inside Megatron's own parser, which comes after the
layout has to be checked against them.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_helix.errors import UserError

# What makes the model and its tokenizer, by Megatron's names. Parallelism is not among it.
_MODEL = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "seq_length", "max_position_embeddings"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("normalization", "norm_epsilon", "apply_layernorm_1p", "qk_layernorm", "qk_l2_norm"),
    *("add_bias_linear", "add_qkv_bias", "swiglu", "squared_relu", "attention_output_gate"),
    *("softmax_type", "window_size", "apply_query_key_layer_scaling"),
    *("untie_embeddings_and_output_weights", "make_vocab_size_divisible_by", "vocab_size"),
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "null_tokenizer_eod_id"),
    *("num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk"),
    *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_topk_scaling_factor"),
    *("moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm"),
    *("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_shared_expert_intermediate_size", "moe_latent_size", "tiktoken_pattern"),
    *("fp16", "bf16"),
)


def require_checkpoint(folder: Path) -> None:
    """Refuse a folder that Megatron has saved no checkpoint in.

    Raises:
        UserError: naming the folder and what is missing.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise UserError(
            f"--load: must be a folder that Megatron saved checkpoints in, and {tracker} does not"
            " exist; give the folder that training had as --save"
        )


def model_arguments(folder: Path) -> argparse.Namespace:
    """The arguments that the newest checkpoint in ``folder`` was trained with.

    Raises:
        UserError: when there is no checkpoint, or none in Megatron's distributed format.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    require_checkpoint(folder)
    iteration = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    name = iteration if iteration == "release" else f"iter_{int(iteration):07d}"
    if not (folder / name / "metadata.json").is_file():
        raise UserError(
            f"--load: needs a checkpoint in the torch_dist format, and {folder / name} is not one;"
            " save with --ckpt-format torch_dist"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # as it should be
        return load_common_state_dict(str(folder / name))["args"]


def model_flags(saved: argparse.Namespace) -> list[str]:
    """Megatron's flags for the model of ``saved`` arguments: those that are not the default."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions: dict[str, list[Any]] = {name: [] for name in _MODEL}
    for action in parser._actions:
        if action.dest in actions and action.option_strings:
            actions[action.dest].append(action)
    words = []
    for name, choices in actions.items():
        value = getattr(saved, name, None)
        if not choices or value is None or value == choices[0].default:
            continue
        if name == "num_query_groups" and not saved.group_query_attention:
            continue
        words += next(given for action in choices if (given := _words(action, value)))
    return words


def _words(action: argparse.Action, value: Any) -> list[str]:
    """The words that make ``action`` store ``value``; none if it cannot."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag] if action.const == value else []
    if hasattr(value, "name"):  # an enum, which the command line names
        return [flag, value.name]
    if isinstance(value, (list, tuple)):
        together = ",".join(map(str, value))
        return [flag, *map(str, value)] if action.nargs else [flag, together]
    return [flag, str(value)]


def load(flags: list[str]) -> tuple[Any, argparse.Namespace]:
    """The model of completed ``flags`` on this rank, with its weights, and the parsed flags.

    Makes the process groups. The model is that of one pipeline stage, not wrapped.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_helix import arguments, compat, plugin
    from megatron_helix.flags import add_helix_arguments

    compat.use_compiled_dataset_helpers()
    if arguments.want_helix(flags):
        compat.relax_head_check()
    sys.argv = [sys.argv[0], *flags]  # Megatron's parser reads it there
    args = parse_and_validate_args(extra_args_provider=add_helix_arguments)
    initialize_megatron()
    model_config = plugin.enable(args, gpt_config_from_args(args))
    container = pretrain_cfg_container_from_args(args, model_config)
    builder = model_config.get_builder_cls()(model_config)
    model = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=container.ddp,
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    load_checkpoint(model, None, None)
    (stage,) = unwrap_model(model)
    return stage, args

"""A checkpoint's model: what of its saved arguments makes it, and its weights, under any layout.

Everything that Megatron reads to build a model or its tokenizer is taken over, except for what
belongs to the run that saved it (:mod:`megatron_helix.inference.run_fields`). Flags of Megatron's
that are given all the same win.

Not by Megatron's ``--use-checkpoint-args``. That takes over a list of names, and leaves out some of
what makes a model (in 0.19: ``--qk-layernorm``, ``--attention-output-gate``, ``--softmax-type``,
``--window-size``, the norm's epsilon, the scaling of rotary embeddings, a byte-level tokenizer's
vocabulary), silently where the user does not repeat it.
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.inference.run_fields import RUN_FIELDS
from megatron_helix.options.flags import FlagParser, add_helix_arguments

# Names that earlier versions of Megatron saved.
_FORMER = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}
_TANH_GELU = ("bias_gelu_fusion", "use_te_activation_func")


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


def saved_arguments(folder: Path) -> argparse.Namespace:
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


def of_model(saved: argparse.Namespace) -> dict[str, Any]:
    """What of the ``saved`` arguments makes the model and its tokenizer."""
    names = read_by_megatron() - RUN_FIELDS
    former = {now: getattr(saved, then) for now, then in _FORMER.items() if hasattr(saved, then)}
    return {name: value for name, value in {**former, **vars(saved)}.items() if name in names}


def read_by_megatron() -> set[str]:
    """Names of the arguments that Megatron reads when it builds a GPT model or its tokenizer.

    Those of the fields of its config classes, for it looks each of them up; and those that the
    functions which fill these classes in mention.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.training import argument_utils
    from megatron.training.models.gpt import GPTModelConfig

    classes = (MLATransformerConfig, HeterogeneousTransformerConfig, GPTModelConfig)
    names = {field.name for kind in classes for field in dataclasses.fields(kind)}
    for function in (
        argument_utils.core_transformer_config_from_args,
        argument_utils._apply_yarn_config_from_args,
        argument_utils.gpt_config_from_args,
        build_tokenizer,
    ):
        code = function.__code__
        names |= {*code.co_names, *(word for word in code.co_consts if isinstance(word, str))}
    return names


def as_flags(model: Mapping[str, Any]) -> list[str]:
    """Megatron's flags that say ``model``, as far as there are flags for it.

    For checks that read flags; the model itself is built of the values.
    """
    from megatron.training.arguments import add_megatron_arguments

    words, said = [], set()
    for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions:
        value = model.get(action.dest)
        if action.dest in said or value is None or value == action.default:
            continue
        if given := _words(action, value):
            said.add(action.dest)
            words += given
    return words


def of_model_among(flags: Sequence[str]) -> list[str]:
    """Those of Megatron's ``flags`` that make the model."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is not given is not there
    return as_flags(of_model(parser.parse_known_args(list(flags))[0]))


def _words(action: argparse.Action, value: Any) -> list[str]:
    """The words that make ``action`` store ``value``; none if it cannot."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag] if action.const == value else []
    if action.nargs and isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    if isinstance(value, (list, tuple)):
        value = str(value).replace(" ", "")  # as Megatron's patterns
    if action.choices and value not in action.choices:
        return []
    return [f"{flag}={value}"]


def parsed(flags: Sequence[str], saved: argparse.Namespace) -> argparse.Namespace:
    """``flags`` as Megatron parses them, on top of the ``saved`` model.

    Raises:
        UserError: for what is none of Megatron's flags, nor of helix's, or has a bad value.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = FlagParser()
    return on_top_of(saved, flags)(add_megatron_arguments(parser)).parse_args(list(flags))


def on_top_of(
    saved: argparse.Namespace, flags: Sequence[str]
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An ``extra_args_provider`` of Megatron's parser whose defaults are the ``saved`` model's."""
    model = of_model(saved)
    if {"--fp16", "--bf16"} & set(flags):  # one of them is wanted, whatever it was
        model |= {"fp16": False, "bf16": False}

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_helix_arguments(parser)
        parser.set_defaults(**model)
        return parser

    return provider


def config_of(args: argparse.Namespace, saved: argparse.Namespace) -> Any:
    """Megatron's config of the ``saved`` model, from validated arguments on top of it.

    Its fused bias and GELU, and TransformerEngine's GELU, are the tanh approximation, which the
    unfused GELU is not: where the model was trained with that and the kernel is not to be had, the
    function is.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from torch.nn.functional import gelu

    model_config = gpt_config_from_args(args)
    transformer = model_config.transformer
    unfused = transformer.activation_func is gelu and not transformer.bias_activation_fusion
    if unfused and any(getattr(saved, name, False) for name in _TANH_GELU):
        transformer.activation_func = partial(gelu, approximate="tanh")
    return model_config


def load(flags: Sequence[str], saved: argparse.Namespace) -> Any:
    """The ``saved`` model under completed ``flags`` on this rank, with its weights.

    Makes the process groups. The model is that of one pipeline stage, not wrapped.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_helix import plugin
    from megatron_helix.options import arguments
    from megatron_helix.upstream import patches

    patches.use_compiled_dataset_helpers()
    if arguments.want_helix(flags):
        patches.relax_head_check()
    sys.argv = [sys.argv[0], *flags]  # Megatron's parser reads it there
    args = parse_and_validate_args(extra_args_provider=on_top_of(saved, flags))
    model_config = plugin.enable(args, config_of(args, saved), training=False)
    initialize_megatron()
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
    return stage

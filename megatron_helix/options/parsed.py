"""The flags as Megatron's own parser reads them: what cannot run beside helix, what nobody knows.

:func:`require_run` checks arguments that Megatron has parsed, whatever set them: flags, a layer
spec, a checkpoint, another entry point.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange import strategy
from megatron_helix.options import arguments
from megatron_helix.options.checks import require_loadable, require_plan
from megatron_helix.options.features.check import require_compatible
from megatron_helix.options.flags import FlagParser, add_helix_arguments
from megatron_helix.options.float8 import require_float8, require_float8_tokens
from megatron_helix.options.graphs import require_graphs
from megatron_helix.options.uneven import require_paddable, require_paddable_heads
from megatron_helix.partition.layout import HelixLayout


def require_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Refuse completed flags that cannot run beside helix, before any rank is started.

    With Megatron's own parser, so that no spelling of a flag is missed; to be called where Megatron
    has been imported anyway.

    Returns:
        What the parser makes of them, before Megatron's validation.

    Raises:
        UserError: naming the flag, the reason and the remedy; for a value of the wrong type.
    """
    args = _every_flag().parse_known_args(argv)[0]
    if arguments.wants_helix(args) and args.helix_m > 1:
        require_compatible(args)
    return args


def require_known(argv: Sequence[str]) -> None:
    """Refuse a flag that nobody knows; a script of Megatron-LM's own may know others.

    Raises:
        UserError: naming it.
    """
    unknown = _every_flag().parse_known_args(argv)[1]
    if unknown:
        raise UserError(
            f"{unknown[0]}: must be a flag of Megatron's or helix's, or a flag's value, and is"
            " neither; correct it"
        )


@cache
def _every_flag() -> argparse.ArgumentParser:
    """A parser of Megatron's flags and helix's; to make one takes a good part of a second."""
    from megatron.training.arguments import add_megatron_arguments

    return add_helix_arguments(add_megatron_arguments(FlagParser()))


def require_run(
    args: argparse.Namespace, model_config: Any, *, training: bool = True
) -> HelixLayout:
    """Check arguments that Megatron has parsed, and the configs made from them, for helix.

    Whatever set them: flags, a layer spec, a checkpoint's own arguments, another entry point.

    Args:
        args: Megatron's arguments with the helix flags, which ask for a partition.
        model_config: the ``GPTModelConfig`` made from them.
        training: whether micro-batches of ``args`` will be trained on.

    Returns:
        The partition.

    Raises:
        UserError: for what cannot run.
    """
    strategy.require_known(arguments.choice(args))
    transformer = model_config.transformer
    m, n, size = args.helix_m, args.helix_n, args.tensor_model_parallel_size
    if not isinstance(m, int) or not isinstance(n, int) or m * n != size:
        raise UserError(
            f"--tensor-model-parallel-size: must be --helix-m x --helix-n, got {size} and {m} x"
            f" {n}; give Megatron's parser what megatron_helix.pretrain_gpt.prepare returns"
        )
    cut = arguments.layout(
        args,
        num_attention_heads=transformer.num_attention_heads,
        num_query_groups=transformer.num_query_groups,
        kv_channels=transformer.kv_channels,
    )
    if cut.m > 1:
        require_compatible(args, model_config, transformer)
        require_loadable(args)
        require_paddable_heads(args, cut)
        require_float8(arguments.choice(args), transformer, cut)
        if training:
            require_graphs(args, arguments.choice(args), transformer)
            tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
            require_float8_tokens(arguments.choice(args), transformer, cut, tokens)
            require_plan(args, arguments.choice(args), cut)
    require_paddable(args, transformer)
    return cut

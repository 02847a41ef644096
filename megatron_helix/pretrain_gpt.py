"""``torchrun -m megatron_helix.pretrain_gpt``: Megatron's training loop with the helix flags.

Takes every flag of Megatron-LM's ``pretrain_gpt.py`` and those of :mod:`megatron_helix.flags`.
Without ``--helix-m`` and ``--helix-n`` it is stock Megatron: that is how baselines run.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_helix import arguments, compat, errors, signals
from megatron_helix.flags import add_helix_arguments

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one rank. Rank and world size come from the environment, as torchrun sets them."""
    argv = prepare_rank(sys.argv[1:] if argv is None else argv)
    with errors.told():
        train(argv)


def prepare_rank(argv: Sequence[str]) -> Sequence[str]:
    """:func:`prepare` and :func:`adapt_megatron` for the rank that torchrun started.

    Raises:
        SystemExit: with code 2, for flags that cannot run; one rank says what is wrong.
    """
    signals.end_with_torchrun()
    first = os.environ.get("RANK", "0") == "0"
    quiet = contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO())
    with errors.told(), quiet:  # what imports have to say, one rank says
        argv = prepare(argv, int(os.environ.get("WORLD_SIZE", "1")))
    adapt_megatron(argv)
    return argv


def prepare(argv: Sequence[str], world_size: int) -> list[str]:
    """Everything before the first process group: device, imports, flags.

    Returns:
        The flags to :func:`train` with.

    Raises:
        ValueError: for flags that cannot run.
    """
    argv = arguments.complete(argv, world_size)
    compat.quieten_imports()
    if arguments.device(argv) == "cpu":
        from megatron_helix import cpu_device

        cpu_device.enable()
        compat.skip_warm_up()
    from megatron_helix import gpt_training, plugin  # noqa: F401  # slow: forked ranks inherit them

    compat.read_flag_help_once()
    return argv


def adapt_megatron(argv: Sequence[str]) -> None:
    """What of Megatron has no seam and must be touched before it parses these flags."""
    compat.use_compiled_dataset_helpers()
    if arguments.want_helix(argv):
        compat.relax_head_check()


def train(argv: Sequence[str]) -> None:
    """Megatron's ``pretrain`` with flags that :func:`prepare` has completed."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_helix import gpt_training

    adapt_megatron(argv)
    sys.argv = [sys.argv[0], *argv]  # Megatron's parser reads it there
    args = parse_and_validate_args(extra_args_provider=flags_beside())
    model_config = turn_on(args, gpt_config_from_args(args))
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        gpt_training.train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        gpt_training.forward_step,
    )


def flags_beside(other: Provider | None = None) -> Provider:
    """An ``extra_args_provider`` of Megatron's parser: the helix flags, after another's flags."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_helix_arguments(other(parser) if other else parser)

    return provider


def turn_on(args: argparse.Namespace, model_config: Any) -> Any:
    """What the parsed flags ask for: helix layers in ``model_config``, which is returned, metrics.

    The ``pretrain_gpt.py`` of a patched Megatron-LM checkout calls it too.
    """
    from megatron_helix import plugin
    from megatron_helix.recording.record import Recording, record

    if args.helix_metrics:
        record(
            Recording(
                folder=args.helix_metrics,
                rank=args.rank,
                batch=args.global_batch_size,
                sequence=args.seq_length,
                steps=args.train_iters,
                phase=args.helix_phase,
                profile=args.helix_profile,
                count_flops=args.helix_core_attention != "flex",
            )
        )
    return plugin.enable(args, model_config)


if __name__ == "__main__":
    main()

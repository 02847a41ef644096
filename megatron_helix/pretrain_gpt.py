"""``torchrun -m megatron_helix.pretrain_gpt``: Megatron's training loop with the helix flags.

Takes the flags of Megatron-LM's ``pretrain_gpt.py`` and those of
:mod:`megatron_helix.options.flags`; what it cannot obey it refuses
(:mod:`megatron_helix.options.unavailable`). Without ``--helix-m`` and ``--helix-n`` it is stock
Megatron: that is how baselines run.
"""

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megatron_helix import samples
from megatron_helix.basics import errors, signals
from megatron_helix.options import arguments, environment, folders, parsed, spelling, unavailable
from megatron_helix.options.flags import FlagParser, add_helix_arguments, shown
from megatron_helix.recording import rank_files
from megatron_helix.upstream import initial_weights, patches, resuming

PROGRAM_START_S = time.time()  # before the imports that take seconds
Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one rank. Rank and world size come from the environment, as torchrun sets them."""
    if os.environ.get("RANK", "0") != "0":
        for category in (UserWarning, FutureWarning):  # the first rank's are enough
            warnings.filterwarnings("ignore", category=category)
    argv = prepare_rank(sys.argv[1:] if argv is None else argv, script=False)
    from megatron.training import set_startup_timestamps

    set_startup_timestamps(program_start=PROGRAM_START_S, main_entry=time.time())
    with errors.told():
        train(argv)


def prepare_rank(argv: Sequence[str], *, script: bool = True) -> Sequence[str]:
    """:func:`prepare` and :func:`adapt_megatron` for the rank that torchrun started.

    Args:
        argv: the user's flags.
        script: whether Megatron-LM's own script goes on from here.

    Raises:
        SystemExit: with code 2, for flags that cannot run; one rank says what is wrong. With code 0
            for ``--help``.
    """
    signals.end_with_torchrun()
    help_instead(argv)
    first = os.environ.get("RANK", "0") == "0"
    quiet = contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO())
    with errors.told(), quiet:  # what imports have to say, one rank says
        argv = prepare(argv, int(os.environ.get("WORLD_SIZE", "1")), script=script)
    adapt_megatron(argv)
    return argv


def help_instead(argv: Sequence[str]) -> None:
    """Show the flags and end, where they are asked for: helix's at once, then Megatron's.

    Raises:
        SystemExit: with code 0.
    """
    if not {"--help", "-h"} & set(argv):
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"{shown(add_helix_arguments)}\n\nMegatron's:\n", flush=True)
        patches.quieten()
        from megatron.training.arguments import add_megatron_arguments

        print(shown(add_megatron_arguments), flush=True)
    sys.exit(0)


def prepare(argv: Sequence[str], world_size: int, *, script: bool = False) -> list[str]:
    """Everything before the first process group: device, imports, flags.

    Args:
        argv: the user's flags.
        world_size: ranks of the run.
        script: whether Megatron-LM's own script goes on from here, which has all that it obeys.

    Returns:
        The flags to :func:`train` with.

    Raises:
        UserError: for flags that cannot run.
    """
    spelling.require_spelt(argv, script=script)
    argv = arguments.complete(argv, world_size)
    if not script:
        folders.require_loaded(argv)
    _require_free_metrics(argv)
    make_ready(arguments.device(argv))
    args = parsed.require_flags(argv)
    if not script:
        unavailable.require_available(args, argv)
        parsed.require_known(argv)
        resuming.require_schedule(args, folders.loaded(argv), world_size)
    arguments.require_data(argv)
    if args.helix_initial_weights:
        initial_weights.require(args.helix_initial_weights)
    samples.require(args)
    folders.require_written(argv)  # last: nothing is made for flags that are refused
    return argv


def make_ready(device: str | None) -> None:
    """The device, and imports that take seconds: ranks that are forked later have both."""
    patches.quieten()
    if device == "cpu":
        from megatron_helix.upstream import cpu_device

        cpu_device.enable()
        patches.skip_warm_up()
        patches.fork_checkpoint_manager()
    from megatron.core.models import mimo  # noqa: F401  # which Megatron imports as a run begins

    from megatron_helix import plugin  # noqa: F401
    from megatron_helix.upstream import gpt_training  # noqa: F401

    patches.read_flag_help_once()


def _require_free_metrics(argv: Sequence[str]) -> None:
    parser = add_helix_arguments(FlagParser())
    folder = parser.parse_known_args(argv)[0].helix_metrics
    if folder:
        rank_files.require_free(folder, int(os.environ.get("RANK", "0")))


def adapt_megatron(argv: Sequence[str]) -> None:
    """What of Megatron has no seam and must be touched before it parses these flags."""
    patches.use_compiled_dataset_helpers()
    if arguments.want_helix(argv):
        patches.relax_head_check()


def train(argv: Sequence[str]) -> None:
    """Megatron's ``pretrain`` with flags that :func:`prepare` has completed.

    On the CPU the environment is what Megatron asks for, whatever it was: there are no queues.
    """
    from megatron.core.enums import ModelType
    from megatron.core.package_info import __version__ as core_version
    from megatron.core.utils import get_te_version, get_torch_version
    from megatron.training import inprocess_restart, pretrain, print_rank_0
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_helix.upstream import gpt_data, gpt_training

    adapt_megatron(argv)
    if arguments.device(argv) == "cpu":
        os.environ.update(environment.needed(argv, {}))
    sys.argv = [sys.argv[0], *argv]  # Megatron's parser reads it there
    print_rank_0(
        f"PyTorch {get_torch_version()}, Megatron-Core {core_version}, Transformer Engine"
        f" {get_te_version()}"
    )
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(
        extra_args_provider=flags_beside(),
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    model_config = turn_on(args, gpt_config_from_args(args))
    run(
        pretrain_cfg_container_from_args(args, model_config),
        gpt_data.train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        gpt_training.forward_step,
        store=store,
        get_embedding_ranks=gpt_training.embedding_ranks,
    )


def flags_beside(other: Provider | None = None) -> Provider:
    """An ``extra_args_provider`` of Megatron's parser: the helix flags, after another's flags."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_helix_arguments(other(parser) if other else parser)

    return provider


def turn_on(args: argparse.Namespace, model_config: Any) -> Any:
    """What the parsed flags ask for: helix layers in ``model_config``, metrics, samples.

    The ``pretrain_gpt.py`` of a patched Megatron-LM checkout calls it too.
    """
    from megatron_helix import plugin
    from megatron_helix.recording.record import Recording, record

    with errors.told():
        model_config = plugin.enable(args, model_config)
    if args.helix_metrics:
        record(
            Recording(
                folder=args.helix_metrics,
                rank=args.rank,
                ranks=args.world_size,
                sequence=args.seq_length,
                phase=args.helix_phase,
                profile=args.helix_profile,
            )
        )
    if args.helix_sample_interval:
        samples.install(args)  # around what is recorded: no step's figures have it in them
    return model_config


if __name__ == "__main__":
    main()

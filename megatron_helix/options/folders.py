"""Folders that flags name: what is to be loaded is there, what is to be written can be.

Megatron finds out after minutes of set-up, on some rank; a missing ``--load`` it does not mind at
all, and trains from random weights.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.options.checks import newest_checkpoint
from megatron_helix.options.flags import FlagParser

# What ranks write into; a path of another machine's ("://") is Megatron's to judge.
_WRITTEN = (
    *("save", "helix-metrics", "tensorboard-dir", "data-cache-path", "logits-save-dir"),
    "non-persistent-global-ckpt-dir",
)


def require_loaded(argv: Sequence[str]) -> None:
    """Refuse to start from random weights where others are asked for.

    A ``--load`` that is the ``--save`` of the run is how Megatron's users start what they will go
    on with by the same command: where nothing is there yet, that is said in a line.

    Raises:
        UserError: naming the flag, the folder and what to do.
    """
    args = _read(argv)
    if args.non_persistent_ckpt_type:  # which may be anywhere, a node's memory for one
        return
    here = _found("--load", args.load, args.ckpt_step)
    if here or not (args.load or args.pretrained_checkpoint):
        return
    if args.pretrained_checkpoint:
        if not _found("--pretrained-checkpoint", args.pretrained_checkpoint, args.ckpt_step):
            raise UserError(
                "--pretrained-checkpoint: must be a folder that Megatron saved checkpoints in, got"
                f" {args.pretrained_checkpoint}, which has none; correct the path"
            )
        return
    if args.save is None or Path(args.save).resolve() != Path(args.load).resolve():
        raise UserError(
            "--load: must be a folder that Megatron saved checkpoints in, got"
            f" {args.load}, which has none; correct the path, or leave --load away to start with"
            " random weights (a first start may name its own --save)"
        )
    if args.exit_on_missing_checkpoint:
        raise UserError(
            f"--exit-on-missing-checkpoint: {args.load} must have a checkpoint, and has none; leave"
            " the flag away to start with random weights"
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"--load: {args.load} has no checkpoint yet; this run starts with random weights")


def loaded(argv: Sequence[str]) -> Path | None:
    """The checkpoint that ``--load`` goes on from, on this machine; None where it is none."""
    args = _read(argv)
    if not args.load or "://" in args.load or args.non_persistent_ckpt_type:
        return None
    return newest_checkpoint(Path(args.load), args.ckpt_step)


def require_written(argv: Sequence[str]) -> None:
    """Make the folders that the run will write into.

    Raises:
        UserError: naming the flag of one that cannot be made, or written into.
    """
    for name, folder in vars(_read(argv)).items():
        flag = name.replace("_", "-")
        if flag in _WRITTEN and folder and "://" not in folder:
            files.make_writable(Path(folder), f"--{flag}")


def _found(flag: str, folder: str | None, step: int | None) -> bool:
    """Whether Megatron will find a checkpoint in a folder.

    Raises:
        UserError: when it will look for one that the folder or ``--ckpt-step`` names, in vain.
    """
    if folder is None:
        return False
    if "://" in folder:
        return True
    checkpoint = newest_checkpoint(Path(folder), step)
    if checkpoint and not checkpoint.is_dir():
        named = "--ckpt-step" if step else f"{folder}/latest_checkpointed_iteration.txt"
        raise UserError(
            f"{flag}: must have the checkpoint that {named} names, and {checkpoint} does not exist;"
            " correct one of the two"
        )
    return bool(checkpoint)


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser()
    for name in ("load", "pretrained-checkpoint", "non-persistent-ckpt-type", *_WRITTEN):
        parser.add_argument(f"--{name}")
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--exit-on-missing-checkpoint", action="store_true")
    return parser.parse_known_args(argv)[0]

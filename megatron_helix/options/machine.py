"""The machine by which ``auto`` compares plans."""

import argparse

import torch

from megatron_helix.machine import hardware, hopper
from megatron_helix.machine.hardware import Hardware


def chosen(args: argparse.Namespace, *, on_cpu: bool) -> Hardware | None:
    """That of ``--helix-hardware``, else what is known of the card; None compares bytes.

    The same on every rank of a run on equal cards.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if args.helix_hardware:
        return hardware.load(args.helix_hardware)
    if on_cpu or not torch.cuda.is_available():
        return None
    return hopper.of_card(torch.cuda.get_device_name(), args.world_size)

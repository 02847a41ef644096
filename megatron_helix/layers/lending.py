"""Ranks of a dim group lend each other their shards, where their GPUs reach one another.

Gathers are then copies (:mod:`megatron_helix.kernels.peer_memory`), which must not meet an update.
The end of a step, which Megatron's schedules call before the optimizer, sees to that: so nothing is
lent before it has been called once, and the first step's gathers are collectives.

Lent is what lies in memory of its own. A distributed optimizer keeps all parameters in buffers, of
which it sends parts on, and may do so while a forward pass is under way: with one nothing is lent.
Nor are weights that are gathered in FP8, or once a step.
"""

import argparse
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.distributed as dist

from megatron_helix.kernels import symmetric_memory
from megatron_helix.kernels.peer_memory import PeerMemory
from megatron_helix.kernels.symmetric_memory import SymmetricMemory
from megatron_helix.layers.linear import HelixLinear, finish_step

Model = list[torch.nn.Module]


def may_lend(args: argparse.Namespace) -> bool:
    """Whether a run's flags let shards be lent: they change between steps alone."""
    buffered = args.use_distributed_optimizer or args.overlap_param_gather
    return args.helix_gather_by == "copies" and not buffered


def at_the_end_of_steps(*, lends: bool, say: Callable[[str], None]) -> Callable[[Model], None]:
    """What to call when the gradients of a step are there, and before weights change.

    Args:
        lends: whether shards may be lent.
        say: told once, on every rank, what is lent.
    """
    peers: PeerMemory | None = None
    first = lends

    def finish(model: Model) -> None:
        nonlocal peers, first
        finish_step(model)
        if first:
            peers, first = lend(model, say), False
        if peers is not None:
            peers.settle()

    return finish


def lend(model: Model, say: Callable[[str], None]) -> PeerMemory | None:
    """Lend what can be; None where that is nothing. A collective over each dim group."""
    linears: list[HelixLinear] = [
        module for chunk in model for module in chunk.modules() if _lends(module)
    ]
    if not linears:
        return None
    dim = linears[0].helix_groups.dim
    if not symmetric_memory.within_reach(dim):
        return None
    peers = PeerMemory(dim, SymmetricMemory(dim))
    why = _lent_by_all(peers, [linear.weight for linear in linears])
    if why:
        say(f"helix: the shards of weights are gathered by NCCL, since copy engines do not: {why}")
        return None
    for linear in linears:
        linear.forms.lend(peers)
    say(
        f"helix: from the second step on the shards of {len(linears)} weights are gathered by copy"
        " engines, since GPUs reach each other's memory; as --helix-gather-by copies asks"
    )
    return peers


def _lent_by_all(peers: PeerMemory, weights: list[torch.nn.Parameter]) -> str:
    """Lend them; where a rank cannot, a line that says why, on all ranks."""
    why = ""
    try:
        peers.lend(weights)
    except RuntimeError as error:  # a container that shares no memory with others, say
        why = next(iter(str(error).splitlines()), "") or repr(error)
    everyones: list[Any] = [""] * peers.group.size()
    dist.all_gather_object(everyones, why, group=peers.group)
    return next(filter(None, everyones), "")


def _lends(module: torch.nn.Module) -> TypeGuard[HelixLinear]:
    if not isinstance(module, HelixLinear) or module.plan.exchange != "weights":
        return False
    if module.helix_layout.m == 1 or not module.forms.plain:
        return False
    weight = module.weight
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return alone and weight.is_contiguous()

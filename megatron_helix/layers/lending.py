"""Ranks of a dim group lend each other their shards, where their GPUs reach one another.

Gathers are then copies (:mod:`megatron_helix.kernels.peer_memory`), which must not meet an update.
The end of a step, which Megatron's schedules call before the optimizer, sees to that: so nothing is
lent before it has been called once, and the first step's gathers are collectives.

Lent is what lies in memory of its own. A distributed optimizer keeps all parameters in buffers, of
which it sends parts on; those stay. So do weights that are gathered in FP8, or once a step.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch

from megatron_helix.kernels import symmetric_memory
from megatron_helix.kernels.peer_memory import PeerMemory
from megatron_helix.kernels.symmetric_memory import SymmetricMemory
from megatron_helix.layers.linear import HelixLinear, finish_step

Model = list[torch.nn.Module]


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
    for linear in linears:
        peers.lend(linear.weight)
        linear.forms.lend(peers)
    say(
        f"helix: from the second step on the shards of {len(linears)} weights are gathered by copy"
        " engines, since GPUs reach each other's memory; --helix-gather-by nccl does without"
    )
    return peers


def _lends(module: torch.nn.Module) -> TypeGuard[HelixLinear]:
    if not isinstance(module, HelixLinear) or module.plan.exchange != "weights":
        return False
    weight = module.weight
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return alone and weight.is_contiguous() and module.helix_layout.m > 1 and module.forms.plain

"""Trainings whose ranks lend each other their shards, through memory as gloo ranks have it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_helix import pretrain_gpt
from megatron_helix.exchange import gathered_weight, shards
from megatron_helix.kernels import symmetric_memory
from megatron_helix.kernels.peer_memory import PeerMemory
from megatron_helix.layers import lending
from megatron_helix.layers.linear import HelixLinear
from megatron_helix.recording.comm_ledger import CommLedger, Entries, install
from tests import distributed
from tests.distributed import Curve, run_distributed
from tests.shared_memory import SharedMemory

COPIES = ("--helix-gather-by", "copies")


@dataclass
class Lending:
    """What a rank saw of a training.

    Attributes:
        curve: losses and gradient norms.
        lent: weights that were lent.
        copied: of every step, gathers of theirs by copies.
        sent: of every step, gathers of the same linears' weights that were collectives.
        between: gathers by copies outside steps.
        settled: times that all ranks waited before weights changed.
        traffic: of every step, what a ledger counted.
    """

    curve: Curve = field(default_factory=Curve)
    lent: int = 0
    copied: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    between: int = 0
    settled: int = 0
    traffic: list[Entries] = field(default_factory=list)


def train(
    flags: Sequence[str],
    ranks: int,
    *,
    memory: type[SharedMemory] | None,
    early: bool = False,
) -> list[Lending]:
    """Train with these flags.

    Args:
        flags: as :func:`megatron_helix.pretrain_gpt.prepare` takes them.
        ranks: how many.
        memory: which they read of each other; none.
        early: whether gathers are begun as on a GPU.
    """
    return run_distributed(
        _rank, ranks, pretrain_gpt.prepare([*COPIES, *flags], ranks), memory, early
    )


def _rank(argv: list[str], memory: type[SharedMemory] | None, early: bool) -> Lending:
    """On one rank, whose modules and classes are put back when it is through."""
    found = Lending()
    weights: set[int] = set()  # where they lie; none between steps
    everything: Any = {"lends": PeerMemory.lend, "copies": PeerMemory.start_gathers}
    everything |= {"settles": PeerMemory.settle, "sends": gathered_weight.start_gathers}

    def lend(peers: PeerMemory, parameters: Any) -> None:
        everything["lends"](peers, parameters)
        found.lent += len(parameters)

    def copy(*args: Any) -> Any:
        if weights:
            found.copied[-1] += 1
        else:
            found.between += 1
        return everything["copies"](*args)

    def send(runs: Any, *args: Any, **kwargs: Any) -> Any:
        found.sent[-1] += runs[0].untyped_storage().data_ptr() in weights
        return everything["sends"](runs, *args, **kwargs)

    def settle(peers: PeerMemory) -> None:
        found.settled += 1
        everything["settles"](peers)

    def before(model: list[Any], _curve: Curve) -> None:
        modules = [module for chunk in model for module in chunk.modules()]
        linears = [module for module in modules if isinstance(module, HelixLinear)]
        weights.update(linear.weight.untyped_storage().data_ptr() for linear in linears)
        found.copied.append(0)
        found.sent.append(0)
        ledger.take()

    def after(_model: list[Any], _curve: Curve) -> None:
        found.traffic.append(ledger.take())
        weights.clear()

    lending.SymmetricMemory = memory  # type: ignore[misc, assignment]
    symmetric_memory.within_reach = lambda _group: memory is not None
    PeerMemory.lend, PeerMemory.settle = lend, settle  # type: ignore[method-assign]
    PeerMemory.start_gathers, gathered_weight.start_gathers = copy, send  # type: ignore[method-assign]
    if early:
        shards.runs_beside_compute = lambda _shard: True
    ledger = CommLedger()
    take_out = install(ledger)
    try:
        found.curve = distributed.train(argv, before=before, after=after)
    finally:
        take_out()
    return found

"""Gathers without a collective, between processes that read each other's memory.

A rank that is late shows what waits for it: without, the others read what it has not written yet,
or write what it has not read yet.
"""

import time
from collections.abc import Callable
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from megatron_helix.kernels.peer_memory import PeerMemory
from tests.distributed import run_distributed
from tests.shared_memory import SharedMemory

LATE_S = 0.3  # far longer than what the other rank does meanwhile


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _lent(*parameters: Parameter) -> PeerMemory:
    peers = PeerMemory(_world(), SharedMemory(_world()))
    peers.lend(parameters)
    return peers


def _gathered(peers: PeerMemory, parameter: Parameter, runs: list[torch.Tensor]) -> torch.Tensor:
    """``[runs, p * a, ...]``."""
    p, first = peers.group.size(), runs[0]
    into = first.new_full((len(runs), p * first.size(0), *first.shape[1:]), float("nan"))
    for begun in peers.start_gathers(parameter, runs, [*into]):
        begun.wait()
    return into


def _runs(parameter: Parameter, count: int) -> list[torch.Tensor]:
    return [*parameter.detach().unflatten(0, (count, -1))]


def _differences() -> list[str]:
    """What a rank sees that is not what an all-gather gives."""
    torch.manual_seed(dist.get_rank())
    shapes = {"odd": (3, 5), "halves": (4, 3), "half precision": (6, 2), "long": (300,)}
    parameters = {name: Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    parameters["half precision"] = Parameter(torch.randn(6, 2).bfloat16())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    peers = _lent(*parameters.values())
    wrong = []
    for name, parameter in parameters.items():
        runs = _runs(parameter, 2 if name == "halves" else 1)
        found = _gathered(peers, parameter, runs)
        for run, gathered in zip(runs, found, strict=True):
            expected = torch.empty_like(gathered)
            dist.all_gather_into_tensor(expected, run.contiguous())
            wrong += [] if torch.equal(gathered, expected) else [name]
        kept = torch.equal(parameter, before[name]) and peers.has(parameter)
        wrong += [] if kept else [f"{name} itself"]
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_gather_is_an_all_gather(ranks: int) -> None:
    assert run_distributed(_differences, ranks) == [[]] * ranks


def _is_lent_where_it_lay() -> list[bool]:
    moved, stays = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    peers = _lent(moved, stays)
    moved.data = moved.detach().clone()
    return [peers.has(one) for one in (moved, stays, Parameter(torch.ones(4)))]


def test_a_parameter_that_was_moved_again_is_lent_no_longer() -> None:
    assert run_distributed(_is_lent_where_it_lay, 2) == [[False, True, False]] * 2


def _settled(late_writer: bool, *, rounds: int = 3) -> list[list[float]]:
    """What rank 1 or 0 reads, or writes, late, of values that change every round."""
    parameter = Parameter(torch.full((4,), float(dist.get_rank())))
    peers = _lent(parameter)
    seen = []
    for turn in range(1, rounds + 1):
        if not late_writer and dist.get_rank() == 1:
            time.sleep(LATE_S)
        seen.append(_gathered(peers, parameter, _runs(parameter, 1)).flatten().tolist())
        peers.settle()
        if late_writer and dist.get_rank() == 0:
            time.sleep(LATE_S)
        parameter.data.fill_(10 * turn + dist.get_rank())  # optimizers leave no trace on it either
    return seen


def _changed_in_place(rounds: int = 3) -> list[list[float]]:
    """The same where rank 0 changes values late, and tells the parameter instead of its peers."""
    parameter = Parameter(torch.full((4,), float(dist.get_rank())))
    peers = _lent(parameter)
    seen = []
    for turn in range(1, rounds + 1):
        seen.append(_gathered(peers, parameter, _runs(parameter, 1)).flatten().tolist())
        dist.barrier()
        if dist.get_rank() == 0:
            time.sleep(LATE_S)
        with torch.no_grad():
            parameter.fill_(10 * turn + dist.get_rank())
    return seen


CHANGES: dict[str, Callable[[], list[list[float]]]] = {
    "a late reader": lambda: _settled(late_writer=False),
    "a late writer": lambda: _settled(late_writer=True),
    "a late loader": _changed_in_place,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_rank_reads_what_all_have_written(change: str) -> None:
    values = [[turn] * 4 + [turn + 1.0] * 4 for turn in (0.0, 10.0, 20.0)]
    assert run_distributed(CHANGES[change], 2) == [values] * 2


class _Counted(SharedMemory):
    barriers = 0

    def barrier(self) -> None:
        """As the parent's."""
        super().barrier()
        self.barriers += 1


def _barriers() -> list[int]:
    parameters = [Parameter(torch.ones(4)) for _ in range(2)]
    reach = _Counted(_world())
    peers = PeerMemory(_world(), reach)
    peers.lend(parameters)
    counts = []
    for gathers in (0, 1, 3):
        for parameter in chain.from_iterable([parameters] * gathers):
            _gathered(peers, parameter, _runs(parameter, 1))
        counts.append(reach.barriers)
        peers.settle()
    return [*counts, reach.barriers]


def test_ranks_wait_once_before_they_read_and_once_before_they_write() -> None:
    assert run_distributed(_barriers, 2) == [[0, 1, 3, 4]] * 2

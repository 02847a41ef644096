"""Ranks that live for many calls: what they return, how they fail, and that they forget."""

import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.fuzz.session import NO_ANSWER, CallFailed, Session
from megatron_helix.fuzz.state import Snapshot, forget_models
from megatron_helix.upstream import patches


def total(addend: int) -> tuple[int, int, int]:
    """Rank, ranks, and a sum over them."""
    value = torch.tensor(dist.get_rank() + addend)
    dist.all_reduce(value)
    return dist.get_rank(), int(os.environ["WORLD_SIZE"]), int(value)


def process() -> int:
    return os.getpid()


def fail(*ranks: int) -> None:
    """Raise on these ranks; the others wait for them."""
    if dist.get_rank() in ranks:
        raise KeyError(f"wrong on {len(ranks)} ranks")
    dist.barrier()


def leave_things_behind() -> bool:
    """What a run leaves: globals, patched classes, an environment, groups."""
    clean = not hasattr(parallel_state, "_HELIX_GROUPS") and "LEFT_BEHIND" not in os.environ
    clean = clean and not hasattr(TransformerConfig.__post_init__, "__wrapped__")
    clean = clean and not parallel_state.model_parallel_is_initialized()
    clean = clean and sys.argv[-1] != "left behind"
    parallel_state._HELIX_GROUPS = parallel_state.initialize_model_parallel(dist.get_world_size())
    patches.relax_head_check()
    os.environ["LEFT_BEHIND"] = "1"
    sys.argv.append("left behind")
    return clean


def threads() -> int:
    """Of this process, once it has a model whose graph its collector cannot see through."""
    count = len(os.listdir("/proc/self/task"))
    model = torch.nn.Linear(2, 2)
    group: Any = dist.new_group()
    node = model.weight.expand_as(model.weight).grad_fn
    assert node
    node.next_functions[0][0].register_hook(lambda *_: (model, group))
    model.output = model(torch.ones(2))
    return count


KEPT = []


def keep_a_proxy() -> int:
    """Of an object that is gone."""
    gone = torch.nn.Linear(2, 2)
    KEPT.append(weakref.proxy(gone))
    return os.getpid()


def run_a_program() -> int:
    """That torch has made, as its compiler does and keeps."""
    program = torch.fx.symbolic_trace(lambda x: x + 1)
    forget_models()
    return int(program(torch.tensor(1)))


def be_killed(rank: int) -> None:
    if dist.get_rank() == rank:
        print("about to be killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session(3, tmp_path_factory.mktemp("session")) as living:
        yield living


def test_a_call_returns_what_its_ranks_found(session: Session) -> None:
    for ranks in (3, 1, 2, 3):
        expected = [(rank, ranks, sum(range(ranks)) + 5 * ranks) for rank in range(ranks)]
        assert session.call(total, 5, ranks=ranks) == expected


def test_ranks_live_on_from_call_to_call(session: Session) -> None:
    living = session.call(process, ranks=3)
    assert session.call(process, ranks=2) == living[:2]
    with pytest.raises(CallFailed, match=r"KeyError: 'wrong on 3 ranks'\n(?s:.*) in fail\n"):
        session.call(fail, 0, 1, 2, ranks=3)
    assert session.call(process, ranks=3) == living


def leave(code: int) -> None:
    sys.exit(code)


def test_a_run_that_is_told_to_exit_has_not_failed(session: Session) -> None:
    living = session.call(process, ranks=2)
    assert session.call(leave, 0, ranks=2) == [None, None]
    with pytest.raises(CallFailed, match="SystemExit: 3"):
        session.call(leave, 3, ranks=2)
    assert session.call(process, ranks=2) == living


def test_a_call_finds_nothing_of_the_one_before(session: Session) -> None:
    assert all(session.call(leave_things_behind, ranks=2))
    assert all(session.call(leave_things_behind, ranks=3))


def test_groups_and_models_are_freed(session: Session) -> None:
    counts = [session.call(threads, ranks=3) for _ in range(5)]
    assert counts == 5 * counts[:1]


def test_a_proxy_of_what_is_gone_is_let_be(session: Session) -> None:
    assert session.call(keep_a_proxy, ranks=2) == session.call(process, ranks=2)


def test_a_program_is_kept(session: Session) -> None:
    assert session.call(run_a_program, ranks=2) == [2, 2]


def test_ranks_that_wait_for_one_that_failed_are_ended(session: Session) -> None:
    living = session.call(process, ranks=3)
    with pytest.raises(CallFailed, match="wrong on 1 ranks") as caught:
        session.call(fail, 1, ranks=3)
    assert caught.value.failure.functions[-1] == "fail"
    assert not set(session.call(process, ranks=3)) & set(living)
    for pid in living:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_rank_that_is_killed_says_what_it_said_last(session: Session) -> None:
    with pytest.raises(CallFailed, match=r"exit code -9: rank 2 ended\nabout to be killed"):
        session.call(be_killed, 2, ranks=3)
    assert len(session.call(process, ranks=3)) == 3


def test_a_rank_that_does_not_answer_says_where_it_was(session: Session) -> None:
    with pytest.raises(CallFailed, match=r"ranks \[1\] of 3 did not answer in 3 s") as caught:
        session.call(sleep, 1, ranks=3, timeout_s=3.0)
    assert caught.value.failure.kind == NO_ANSWER
    assert "in sleep" in caught.value.failure.trace


class Thing:
    """Has what classes have."""

    size = 1

    def __init__(self) -> None:
        self.parts = [1]


@pytest.fixture
def module() -> Iterator[Any]:
    """A module with what modules have, below a name of its own."""
    made: Any = ModuleType("left.behind")
    made.Thing = type("Thing", (Thing,), {"__module__": "left.behind", "shared": {}})
    made.count, made.table, made.thing = 0, {"a": [1]}, made.Thing()
    sys.modules["left.behind"] = made
    yield made
    del sys.modules["left.behind"]


def test_what_changed_is_put_back(module: Any) -> None:
    table, thing = module.table, module.thing
    snapshot = Snapshot("left")
    module.count, module.new = 1, 2
    module.table = {}
    table["b"] = table.pop("a")
    thing.parts.append(2)
    thing.parts, thing.more = [3], 4
    module.Thing.size, module.Thing.shared = 2, {1: 1}
    module.Thing.__repr__ = lambda self: "changed"
    module.thing = None
    snapshot.restore()
    assert (module.count, module.table, module.thing) == (0, {"a": [1]}, thing)
    assert module.table is table
    assert thing.parts == [1]
    assert vars(thing).keys() == {"parts"}
    assert not hasattr(module, "new")
    assert (module.Thing.size, module.Thing.shared) == (1, {})


def test_a_submodule_that_was_imported_since_stays(module: Any) -> None:
    snapshot = Snapshot("left")
    module.below = ModuleType("left.behind.below")
    snapshot.restore()
    assert module.below

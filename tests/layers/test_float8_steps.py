"""Steps of linears in FP8 that agree on scales together, against each alone; on gloo ranks.

The linears are stand-ins of TransformerEngine's, and multiply what they gather as torch does.
"""

from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_helix.exchange import shards
from megatron_helix.layers import linear
from megatron_helix.partition.process_groups import HelixGroups, carve
from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed
from tests.engine_case import engine_class
from tests.float8_case import Current, named
from tests.layers.test_engine import (
    COLUMNS,
    PLAIN,
    SIZES,
    Chain,
    Tensors,
    everybody,
    layout_of,
    rows_in_engine,
)

M, STEPS = 2, 3
LINEARS = len(SIZES)


class _InFloat8:
    """A module of TransformerEngine's in FP8, from its first forward pass on."""

    fp8 = True

    @cached_property
    def _quantizers(self) -> list[Current]:
        return [Current()]

    def _get_weight_quantizers(self) -> list[Current]:
        return self._quantizers


def _float8_class(name: str) -> type:
    return type(f"Float8_{name}", (_InFloat8, engine_class(name)), {})


class _Block(TransformerBlock):
    """A decoder block of one layer, as far as linears are told of each other."""

    def __init__(self, linears: dict[str, torch.nn.Module]):
        torch.nn.Module.__init__(self)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict(linears)])
        self.config: Any = SimpleNamespace(recompute_modules=None, recompute_granularity=None)


def _chain(
    groups: HelixGroups, make: Callable[[str], type] = _float8_class, **known: bool
) -> Chain:
    """Of a model of two chunks."""
    chain = Chain(M, groups.head.size(), make, torch.bfloat16, groups=groups)
    chunks = {*SIZES} - {*COLUMNS}, {*COLUMNS}
    linear.link(
        [_Block({name: chain.linears[name] for name in sorted(chunk)}) for chunk in chunks],
        **known,
    )
    return chain


def _train(chain: Chain) -> tuple[list[Tensors], list[list[int]]]:
    """What steps compute, and how many bytes this rank sent in their all-reduces, in order."""
    found, reduced = [], []
    for _ in range(STEPS):
        ledger = CommLedger()
        uninstall = install(ledger)
        found.append(chain.step(PLAIN))
        uninstall()
        calls = ledger.take_calls()
        reduced.append([call.sent_bytes for call in calls if call.kind == "all_reduce"])
        for each in chain.linears.values():
            with torch.no_grad():
                each.weight *= 1.37
    return found, reduced


def _equal(found: list[Tensors], wanted: list[Tensors]) -> bool:
    assert len(found) == len(wanted)
    return all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(found, wanted, strict=True)
        for name in {*mine, *theirs}
    )


def _sent(*weights: int) -> list[int]:
    return [4 * each for each in weights]  # of fp32, by either of two ranks


def _beginning_early(train: Callable[[], Any]) -> Any:
    """Where gathers begin before they are needed, as on a GPU."""
    before, shards.runs_beside_compute = shards.runs_beside_compute, lambda _: True
    try:
        return train()
    finally:
        shards.runs_beside_compute = before


def together(early: bool, frozen: bool) -> tuple[bool, Any, Any]:
    """Weights that agree on scales, and each alone."""

    def train() -> tuple[bool, Any, Any]:
        groups = carve(layout_of(M, 2), everybody())
        # Megatron brings the shards up to date as the forward pass reaches them.
        chains = _chain(groups), _chain(groups, forward_early=False)
        for chain in chains:
            chain.linears["linear_fc1"].weight.requires_grad_(not frozen)
        (found, reduced), (wanted, alone) = (_train(chain) for chain in chains)
        return _equal(found, wanted), reduced, alone

    with named(), rows_in_engine():
        return _beginning_early(train) if early else train()


@pytest.mark.parametrize(("early", "frozen"), [(False, False), (True, True)])
def test_steps_are_those_of_each_weight_alone_with_one_all_reduce(
    early: bool, frozen: bool
) -> None:
    for equal, reduced, alone in run_distributed(together, 4, early, frozen):
        assert equal
        # A first step finds out which weights are quantized.
        assert reduced == [_sent(*[1] * LINEARS), _sent(LINEARS), _sent(LINEARS)]
        assert alone == [_sent(*[1] * LINEARS)] * STEPS


def staged() -> tuple[int, list[list[int]]]:
    """Two pipeline stages, one with a linear less in FP8; the later waits for the earlier."""
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    stage = rank // 2

    def make(name: str) -> type:
        half = stage == 1 and name == "linear_fc2"
        return engine_class(name) if half else _float8_class(name)

    with named(), rows_in_engine():
        chain = _chain(carve(layout_of(M, 1), stages[stage]), make)
        step, token = chain.step, torch.zeros(1)

        def in_turn(*given: Any) -> Tensors:
            if stage:
                dist.recv(token, rank - 2)
            found = step(*given)
            if not stage:
                dist.send(token, rank + 2)
            return found

        chain.step = in_turn  # type: ignore[method-assign]
        return stage, _train(chain)[1]


def test_stages_of_a_pipeline_agree_each_by_itself() -> None:
    for stage, reduced in run_distributed(staged, 4):
        weights = LINEARS - stage
        assert reduced == [_sent(*[1] * weights), _sent(weights), _sent(weights)]

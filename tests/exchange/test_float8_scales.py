"""Scales of all weights agreed on in one go: what each finds alone, in one collective a step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange.float8 import Float8Shard
from megatron_helix.exchange.float8_scales import Rule, Scales
from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed
from tests.float8_case import E4M3, E5M2, Current, Given, engine, scale_of

M, STEPS = 4, 4
# Of every weight: its quantizer, and how wide its values are spread.
WEIGHTS: tuple[tuple[Current, float], ...] = (
    (Current(), 0.02),
    (Current(), 3.0),
    (Current(force_pow_2_scales=True), 0.3),
    (Current(amax_epsilon=0.7), 1e-3),
    (Current(dtype=E5M2), 1.0),
    (Current(), 0.0),
    (Current(), 1e-38),
)
LATE = len(WEIGHTS) - 1  # used from the third step on
AMAXES = (0.0, 1e-45, 1e-38, 1e-5, 0.1, 1 / 3, 0.7, 1.0, 447.9, 448.0, 3e38, math.inf, math.nan)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_scales_are_those_of_each_weight_to_the_last_bit(
    kind: torch.dtype, power_of_2: bool, epsilon: float
) -> None:
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(1)).tolist()
    amaxes = [*AMAXES, *drawn]
    found = Rule(kind, power_of_2, epsilon).scales(torch.tensor(amaxes))
    wanted = torch.tensor([scale_of(amax, kind, power_of_2, epsilon) for amax in amaxes])
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def _shards(dtype: torch.dtype, scales: Scales | None) -> list[Float8Shard]:
    """This rank's of every weight; the largest value of each on another rank."""
    dim = dist.group.WORLD
    assert dim is not None
    shards = []
    for place, (_, spread) in enumerate(WEIGHTS):
        draw = torch.Generator().manual_seed(10 * place + dim.rank())
        drawn = torch.randn(16, 32, generator=draw).clamp(-3, 3) * spread
        drawn[1, 2] = -4 * spread if place % M == dim.rank() else 0
        parameter = torch.nn.Parameter(drawn.to(dtype), requires_grad=place != 1)
        shards.append(Float8Shard(parameter, dim, engine(), columns=place % 2 == 0, scales=scales))
    return shards


def _use(shards: list[Float8Shard], quantizers: list[Current]) -> list[dict[str, Any]]:
    """A step of two passes, and an update: each weight in FP8."""
    for _ in range(2):
        for shard, quantizer in zip(shards, quantizers, strict=True):
            shard.adopt(quantizer)
            shard.quantized()
    found = [vars(shard.quantized()) for shard in shards]
    for shard in shards:
        shard.expire()
        with torch.no_grad():
            shard.shard.mul_(1.37)
    return found


def _reduced(do: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What ``do`` gives, and how many bytes this rank sent in each all-reduce."""
    ledger = CommLedger()
    uninstall = install(ledger)
    found = do()
    uninstall()
    return found, [call.sent_bytes for call in ledger.take_calls() if call.kind == "all_reduce"]


def _sent(*weights: int) -> list[int]:
    return [4 * 2 * (M - 1) * each // M for each in weights]  # of fp32


def agreed(dtype: torch.dtype) -> tuple[bool, list[list[int]], int]:
    """A few steps of weights that agree together, against the same ones alone."""
    together, alone = _shards(dtype, Scales()), _shards(dtype, None)
    quantizers, calls = [quantizer for quantizer, _ in WEIGHTS], Given.calls
    equal, counts = True, []
    for step in range(STEPS):
        some = slice(LATE if step < 2 else None)
        found, reduced = _reduced(lambda some=some: _use(together[some], quantizers[some]))
        wanted = _use(alone[some], quantizers[some])
        counts.append(reduced)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                other = theirs[name]
                equal &= value is other is None or torch.equal(value, other)
    return equal, counts, Given.calls - calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_quantized_as_alone_in_one_collective_a_step(dtype: torch.dtype) -> None:
    every = len(WEIGHTS)
    for equal, counts, calls in run_distributed(agreed, M, dtype):
        assert equal
        # A first step does not know them, nor one that is new.
        assert counts == [_sent(*[1] * LATE), _sent(LATE), _sent(LATE, 1), _sent(every)]
        assert calls == 2 * LATE + 2 * every, "quantized more than once a step"


def changed() -> list[list[int]]:
    """What was reduced in steps between which a weight's recipe and use change."""
    first, second, third = shards = _shards(torch.bfloat16, Scales())[:3]

    def step(*used: Float8Shard) -> list[int]:
        reduced = _reduced(lambda: [shard.quantized() for shard in used])[1]
        for shard in shards:
            shard.expire()
        return reduced

    current = Current()
    for shard in shards:
        shard.adopt(current)
    taken = [step(first, second, third), step(third), step()]
    second.adopt(Given(torch.ones(1), torch.Tensor(), E4M3))
    taken.append(step(second, first, third))
    second.adopt(current)
    return [*taken, step(second, first, third)]


def test_all_ranks_come_to_the_same_collectives_when_weights_change() -> None:
    for found in run_distributed(changed, M):
        # Those that are not used might have been; delayed scaling has its scale.
        assert found == [_sent(3), _sent(3), [], _sent(2), _sent(3)]

"""Weights quantized where their shards lie and gathered in FP8: torch's float8, gloo ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange.float8 import Float8Shard, Float8Weight, QuantizedWhole
from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.exchange.shards import Shards
from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed
from tests.float8_case import E4M3, Current, engine

M, D, F = 4, 32, 48
CUTS = {
    "column": Shards(axis=0),
    "gated": Shards(axis=0, outer=2),
    "heads": Shards(axis=0, outer=6),
    "row": Shards(axis=1),
    "heads of a row": Shards(axis=1, outer=6),
}


def _values(whole: Any) -> torch.Tensor:
    if whole.data is None:
        assert whole.data_transpose.is_contiguous()
        return whole.data_transpose.t().view(E4M3).float() * whole.fp8_scale_inv
    assert whole.data.is_contiguous()
    return whole.data.view(E4M3).float() * whole.fp8_scale_inv


def gathered(cut: str) -> dict[str, Any]:
    """Both passes' weights of a step, and what was sent for them."""
    shards, dim = CUTS[cut], dist.group.WORLD
    assert dim is not None
    drawn = torch.randn(F, D, generator=torch.Generator().manual_seed(1)) * 0.02
    drawn[0, 0] = 1.0  # on one rank: the others must hear of it
    drawn = drawn.bfloat16()
    whole = drawn if shards.axis == 0 else drawn.t().contiguous()
    parts = torch.cat(list(shards.parts(whole, M)), dim=1)  # [m, rows, ...] of the cut axis
    mine = parts[dim.rank()]
    shard: Any = torch.nn.Parameter(mine.t().contiguous() if shards.axis else mine.clone())
    source = Float8Shard(shard, dim, engine(), columns=shards.axis == 1)
    rows = replace(shards, as_they_lie=True)
    forward = Float8Weight(shard, rows, source)
    backward = Float8Weight(shard, shards, source) if shards.axis else forward
    forward.early = True
    forward.start()  # before anybody knows how to quantize: nothing is begun
    assert forward._coming is None
    source.adopt(Current())
    ledger = CommLedger()
    uninstall = install(ledger)
    of = [_values(weight.whole()) for weight in (forward, backward, forward)]
    uninstall()
    exact = Current(internal=False)(whole)
    wanted = exact._data.view(E4M3).float() * exact._scale_inv
    narrow = {kind: entry.sent_bytes for (_, kind), entry in ledger.take().items()}
    calls = source.quantizer.calls
    with torch.no_grad():
        shard *= 2
    kept = torch.equal(_values(forward.whole()), wanted)
    source.expire()
    fresh = torch.equal(_values(forward.whole()), 2 * wanted)
    uninstall = install(ledger)
    GatheredWeight(shard, rows, dim).whole()
    uninstall()
    wide = {kind: entry.sent_bytes for (_, kind), entry in ledger.take().items()}
    blocks = QuantizedWhole(shard, rows, dim, columns=True)
    blocks.adopt(Current())
    block = blocks.whole()
    return {
        "equal": [torch.equal(found, wanted) for found in of],
        "calls": calls,
        "kept": kept,
        "fresh": fresh,
        "narrow": narrow,
        "wide": wide,
        "block": (block._data.shape, block._transpose.shape),  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_gathered_in_fp8_is_the_whole_weight_quantized(cut: str) -> None:
    shape = (F, D) if CUTS[cut].axis == 0 else (D, F)
    for found in run_distributed(gathered, M, cut):
        assert found["equal"] == [True, True, True]
        assert found["calls"] == 1, "quantized more than once a step"
        assert found["kept"]
        assert found["fresh"]
        assert found["wide"]["all_gather"] == 2 * (M - 1) * F * D // M
        scale = 2 * (M - 1) * 4 / M  # one fp32 number, agreed on once
        assert found["narrow"] == {
            "all_gather": 3 * found["wide"]["all_gather"] // 2,
            "all_reduce": scale,
        }
        assert found["block"] == (shape, shape[::-1])

"""Fewer query groups than ranks: what stock gathers and helix exchanges, by the benchmark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.covering import THOROUGH

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "few_query_groups.py"
# The counts' ratios depend on heads, groups and ranks alone: tokens and channels cancel.
SMALL = ("--head-dim", "16", "--hidden", "32", "--sequence", "16", "--rounds", "1", "--warmup", "0")
FEWER_BYTES = 9


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the benchmark finds on 16 ranks with 16 heads and 2 query groups, by variant."""
    out = tmp_path_factory.mktemp("few_query_groups")
    command = [sys.executable, str(BENCHMARK), "--out", str(out), *SMALL]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((out / "results.json").read_text())
    shape = result["shape"]
    assert [shape[name] for name in ("heads", "groups", "m", "n")] == [16, 2, 8, 2]
    return {row["variant"]: row for row in result["variants"]}


@THOROUGH
@pytest.mark.parametrize("suffix", ["", "-sp"])
def test_the_exchange_sends_nine_times_fewer_bytes_than_stocks_gathered_qkv(
    variants: dict[str, dict[str, Any]], suffix: str
) -> None:
    stock, helix = variants[f"stock{suffix}"], variants[f"activations-batch{suffix}"]
    assert helix["exchange_bytes"] > 0
    assert stock["exchange_bytes"] >= FEWER_BYTES * helix["exchange_bytes"]
    assert helix["times_fewer_exchange_bytes"] == pytest.approx(
        stock["exchange_bytes"] / helix["exchange_bytes"]
    )


@THOROUGH
def test_stock_gathers_the_whole_qkv_over_all_ranks(variants: dict[str, dict[str, Any]]) -> None:
    """And reduce-scatters its gradient: (T - 1) / T of all of it, twice, in single precision."""
    tokens, rows = 8 * 16, (16 + 2 * 2) * 16
    assert variants["stock"]["exchange_bytes"] == 2 * 15 * tokens * rows // 16 * 4


@THOROUGH
def test_every_variant_is_measured_and_is_the_same_attention(
    variants: dict[str, dict[str, Any]],
) -> None:
    assert len(variants) == 7
    for row in variants.values():
        assert row["ms"] > 0
        assert row["difference"] < 1e-5
    # Not compared with itself alone: another order of sums rounds differently.
    assert variants["activations-batch"]["difference"] > 0

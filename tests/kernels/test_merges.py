"""Two parts of an attention, merged: on the CPU, and by the kernel in Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_helix.kernels.merges import merge

T, H, D = 37, 3, 24


def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
    """Scores of all keys, and values; whole, and in two parts."""
    draw = torch.Generator().manual_seed(1)
    scores = 4 * torch.randn(T, H, 10, generator=draw, dtype=torch.float64)
    values = torch.randn(10, D, generator=draw, dtype=torch.float64)
    found = []
    for keys in (slice(None), slice(0, 4), slice(4, None)):
        found += [
            (scores[..., keys].softmax(-1) @ values[keys]).to(dtype),
            scores[..., keys].logsumexp(-1).to(torch.promote_types(dtype, torch.float32)),
        ]
    return found


def test_parts_are_merged_to_the_whole() -> None:
    whole, whole_lse, output, lse, part, part_lse = drawn(torch.float64)
    merge(output, lse, part, part_lse)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_queries_that_see_nothing_keep_what_they_have() -> None:
    whole, whole_lse, output, lse, part, part_lse = drawn(torch.float64)
    seen = torch.arange(T) % 3 != 0
    part[~seen], part_lse[~seen] = 0.0, torch.nan
    whole[~seen], whole_lse[~seen] = output[~seen], lse[~seen]
    merge(output, lse, part, part_lse, seen)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(lse, whole_lse)


INTERPRETED = """
import torch
from megatron_helix.kernels import merges, merging
from tests.kernels.test_merges import T, drawn
for dtype, seen in ((torch.float32, None), (torch.bfloat16, torch.arange(T) % 3 != 0)):
    _, _, output, lse, part, part_lse = drawn(dtype)
    if seen is not None:
        part[~seen], part_lse[~seen] = 0.0, torch.nan
    expected = output.clone(), lse.clone()
    merges.merge(*expected, part, part_lse, seen)
    merging.merge(output, lse, part, part_lse, seen)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(lse, expected[1])
"""


def test_the_kernel_does_the_same() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "PATH": ""},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

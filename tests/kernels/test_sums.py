"""Parts added up: in fp32, rounded once, wherever the sum lies and whatever its type."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_helix.exchange import main_grad
from megatron_helix.kernels import sums

HALVES = (torch.bfloat16, torch.float16)
TYPES = [(wide, half) for half in HALVES for wide in (torch.float32, half)]
TYPES += [(torch.float32, torch.float32), (torch.float64, torch.float64)]


def _drawn(m: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, *shape, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize(("accumulator", "part"), TYPES)
def test_a_sum_is_rounded_once(accumulator: torch.dtype, part: torch.dtype, m: int) -> None:
    parts, before = _drawn(m, 30, 50, dtype=part), _drawn(1, 30, 50, dtype=accumulator)[0]
    exact = before.double() + parts.double().sum(0)
    after = before.clone()
    sums.add(after, parts.clone())
    # Of the sum itself one rounding, and m in fp32 of what it passed through on the way.
    passed = before.double().abs() + parts.double().abs().sum(0)
    wide = torch.promote_types(accumulator, torch.float32)
    allowed = exact.abs() * torch.finfo(accumulator).eps / 2 + m * passed * torch.finfo(wide).eps
    assert after.dtype == accumulator
    assert ((after.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("accumulator", "part"), TYPES)
def test_a_sum_that_lies_transposed_is_the_same(
    accumulator: torch.dtype, part: torch.dtype
) -> None:
    parts = _drawn(3, 30, 50, dtype=part)
    straight = torch.zeros(30, 50, dtype=accumulator)
    lying = torch.zeros(50, 30, dtype=accumulator)
    sums.add(straight, parts.clone())
    sums.add(lying.t(), parts)
    assert torch.equal(lying.t(), straight)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_one_part_is_added_as_it_is(dtype: torch.dtype) -> None:
    parts, accumulator = _drawn(1, 30, 50, dtype=dtype), torch.randn(30, 50, dtype=dtype)
    expected = accumulator + parts[0]
    sums.add(accumulator, parts)
    assert torch.equal(accumulator, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_total_is_the_rounded_sum(dtype: torch.dtype) -> None:
    parts = _drawn(3, 30, 50, dtype=dtype)
    assert torch.equal(sums.total(parts), parts.float().sum(0).to(dtype))
    assert not torch.equal(sums.total(parts), parts[0] + parts[1] + parts[2])  # rounded twice


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_parts_of_a_gradient_are_rounded_to_main_grad_only(
    dtype: torch.dtype, turned: bool
) -> None:
    shard = torch.nn.Parameter(torch.zeros(30, 50, dtype=dtype))
    accumulator = torch.zeros(30, 50)
    setattr(shard, "main_grad", accumulator)  # noqa: B010  # as Megatron does
    parts = _drawn(3, 50, 30, dtype=dtype) if turned else _drawn(3, 30, 50, dtype=dtype)
    expected = parts.float().sum(0)
    runs = (lambda of: [of.t()]) if turned else (lambda of: [of])
    assert main_grad.add(shard, [parts], runs) is None
    assert torch.equal(accumulator, expected.t() if turned else expected)


INTERPRETED = """
import torch
from megatron_helix.kernels import summation, sums
single, half, brain = torch.float32, torch.float16, torch.bfloat16
torch.manual_seed(1)
for m, shape in ((1, (1, 7)), (2, (70,)), (3, (130, 70))):
    for wide, narrow in ((single, brain), (single, half), (half, half), (brain, brain)):
        parts = torch.randn(m, *shape).to(narrow)
        for turned in (False, True)[: len(shape)]:
            lying = torch.randn(*reversed(shape) if turned else shape).to(wide)
            sum = lying.t() if turned else lying
            expected = sum.clone()
            sums.add(expected, parts)
            summation.add(sum, parts)
            # The interpreter cuts off where hardware rounds to bfloat16.
            allowed = expected.abs() * 2**-7 if wide == brain else 0 * expected
            assert ((sum - expected).abs() <= allowed).all(), (m, shape, wide, narrow, turned)
"""


def test_the_summation_kernel_by_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)

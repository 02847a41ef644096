"""Copies into another order: the same elements and gradients, whatever the width of a word."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_helix.kernels import copies

WIDE = torch.float16, (3, 4, 2, 16)
NARROW = torch.float16, (3, 4, 2, 6)  # runs of 12 bytes


@pytest.mark.parametrize(("dtype", "shape"), [WIDE, NARROW, (torch.float64, (3, 4, 2, 3))])
@pytest.mark.parametrize("order", [(2, 0, 1, 3), (1, 0, 2, 3), (0, 3, 1, 2)])
def test_a_copy_is_torchs(
    dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    x = torch.randn(shape).to(dtype).permute(order)
    copied = copies.contiguous(x)
    assert copied.is_contiguous()
    assert torch.equal(copied, x)
    assert copied.data_ptr() != x.data_ptr()


def test_words_are_taken_only_where_they_lie_whole() -> None:
    dtype, shape = WIDE
    x = torch.zeros(shape, dtype=dtype)
    assert copies._has_whole_words(x.permute(2, 0, 1, 3))
    assert not copies._has_whole_words(x.permute(0, 3, 1, 2))  # no runs
    assert not copies._has_whole_words(torch.zeros(NARROW[1], dtype=dtype).transpose(0, 1))
    assert not copies._has_whole_words(torch.zeros(shape, dtype=dtype)[..., :12])  # of 24 bytes
    assert not copies._has_whole_words(torch.zeros(65, dtype=dtype)[1:].view(4, 16).transpose(0, 1))
    shifted = torch.zeros(8 * 16 + 4, dtype=dtype)[4:].view(2, 4, 16).transpose(0, 1)
    assert not copies._has_whole_words(shifted)  # runs that begin within a word
    assert torch.equal(copies.contiguous(shifted), shifted)


def test_what_is_contiguous_is_not_copied() -> None:
    x = torch.zeros(2, 3)
    assert copies.contiguous(x) is x


def test_gradients_go_back_through_the_copy() -> None:
    x = torch.randn(3, 4, 2, 16, requires_grad=True)
    weight = torch.randn(2, 3, 4, 16)
    (copies.packed(x.permute(2, 0, 1, 3)) * weight).sum().backward()
    assert torch.equal(x.grad, weight.permute(1, 2, 0, 3))


@pytest.mark.parametrize("lengths", [(3, 3, 3), (2, 3, 3), (1,)])
@pytest.mark.parametrize("dim", [0, 2])
def test_parts_of_unequal_length_are_joined_without_what_fills_them_up(
    lengths: tuple[int, ...], dim: int
) -> None:
    shape = [4, 5, 6]
    shape[dim] = sum(lengths)
    whole = torch.randn(shape, requires_grad=True)
    parts = copies.parted(whole, lengths, dim)
    assert parts.is_contiguous()
    for part, length, piece in zip(parts, lengths, whole.split(lengths, dim), strict=True):
        assert torch.equal(part.narrow(dim, 0, length), piece)
        assert not part.narrow(dim, length, max(lengths) - length).count_nonzero()
    weight = torch.randn_like(parts)
    parts.backward(weight)
    assert torch.equal(whole.grad, copies.joined(weight, lengths, dim))

    given = torch.randn_like(weight).requires_grad_()
    joined = copies.joined(given, lengths, dim)
    joined.backward(whole.detach())
    assert torch.equal(given.grad, copies.parted(whole.detach(), lengths, dim))


INTERPRETED = """
import torch
from megatron_helix.kernels.transposition import transposed
half, single = torch.float16, torch.float32
for rows, columns, dtype in ((64, 64, half), (130, 70, single), (5, 200, torch.int8)):
    x = (torch.randn(rows, columns) * 50).to(dtype)
    y = transposed(x)
    assert y.is_contiguous() and torch.equal(y, x.t()), (rows, columns)
"""


def test_the_transposition_kernel_by_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)

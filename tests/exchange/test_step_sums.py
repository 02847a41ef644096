"""A step's sums of products in FP8, whose factors lie transposed: a stand-in for the GEMM."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange import gemm
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.step_sums import StepSums
from tests.distributed import run_distributed

M, N, D, F = 3, 10, 24, 36
CUTS = {
    "column": Shards(axis=0),
    "gated": Shards(axis=0, outer=2),
    "heads": Shards(axis=0, outer=6),
    "row": Shards(axis=1),
    "halves of a row": Shards(axis=1, outer=2),
    "heads of a row": Shards(axis=1, outer=4, lengths=(2, 2, 2)),
}


@dataclass
class Scaled:
    """``Float8TensorStorage`` with the transposed data alone, in double."""

    data: None
    data_transpose: torch.Tensor
    fp8_scale_inv: float
    fp8_dtype: str

    @classmethod
    def of(cls, x: torch.Tensor, scale_inv: float) -> "Scaled":
        """TransformerEngine keeps the leading dimensions behind the features."""
        return cls(None, x.movedim(-1, 0).contiguous() / scale_inv, scale_inv, "e4m3")

    @property
    def _transpose(self) -> torch.Tensor:
        return self.data_transpose

    @property
    def _scale_inv(self) -> float:
        return self.fp8_scale_inv

    @property
    def _fp8_dtype(self) -> str:
        return self.fp8_dtype


def multiply(x: Scaled, dy: Scaled, *, out: torch.Tensor, **how: Any) -> None:
    """``general_gemm`` in FP8 by rows; like it, it asks for contiguous memory."""
    assert how["layout"] == "NT"
    assert how["accumulate"]
    rows, columns = dy.data_transpose, x.data_transpose.flatten(1)
    assert rows.is_contiguous()
    assert out.is_contiguous()
    out += (rows.flatten(1) @ columns.t()) * dy.fp8_scale_inv * x.fp8_scale_inv


def summed(shards: Shards, how: str) -> torch.Tensor:
    """What this rank has of two micro-batches: of whole gradients, of products, of those in FP8."""
    home, row = dist.group.WORLD, shards.axis == 1
    assert home is not None
    shard: Any = torch.nn.Parameter(torch.zeros(D, F // M) if row else torch.zeros(F // M, D))
    shard.main_grad = torch.zeros_like(shard, dtype=torch.float64)
    sums = StepSums(shard, shards, home)
    draw = torch.Generator().manual_seed(home.rank())
    for scale_inv in (0.5, 2.0):
        grad, x = (
            torch.randn(N, 2, width, generator=draw, dtype=torch.float64)
            for width in ((D, F) if row else (F, D))
        )
        if how == "whole":
            sums.add(gemm.weight_gradient(grad, x))
        elif how == "product":
            sums.add_product(grad, x)
        else:
            factors: Any = Scaled.of(grad, scale_inv), Scaled.of(x, 3 * scale_inv)
            sums.add_product(*factors)
    sums.finish()
    return shard.main_grad


def errors(cut: str) -> list[float]:
    """Of sums of products from those of whole gradients."""
    stand_ins: dict[str, Any] = {
        "_float8": lambda: Scaled,
        "_is_float8": lambda x: isinstance(x, Scaled),
        "_general_gemm": lambda: multiply,
    }
    exact = summed(CUTS[cut], "whole")
    assert exact.abs().max() > 1
    with mock.patch.multiple(gemm, **stand_ins):
        found = [summed(CUTS[cut], how) for how in ("product", "float8")]
    return [float((one - exact).abs().max() / exact.abs().max()) for one in found]


@pytest.mark.parametrize("cut", CUTS)
def test_products_are_summed_part_by_part(cut: str) -> None:
    for of_rank in run_distributed(errors, M, cut):
        assert max(of_rank) < 1e-14

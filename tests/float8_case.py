"""TransformerEngine's FP8 with one scale a tensor on the CPU: its names, with torch's float8.

TransformerEngine 2.20.2, ``transformer_engine/pytorch/tensor/float8_tensor.py``, and for the scale
``common/recipe/recipe_common.cuh``. Each quantizer counts its calls, and the weights it quantized.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_helix.exchange.float8 import Float8Engine

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale_of(amax: float, kind: torch.dtype, power_of_2: bool, epsilon: float) -> float:
    """Of one weight, in numpy's single precision."""
    largest = np.float32(amax)
    if largest < np.float32(epsilon):
        largest = np.float32(epsilon)
    if largest == 0 or not np.isfinite(largest):
        return 1.0
    with np.errstate(over="ignore"):
        scale = np.float32(torch.finfo(kind).max) / largest
    if np.isinf(scale):
        scale = np.finfo(np.float32).max
    if power_of_2:
        scale = np.float32(2.0 ** (np.frexp(scale)[1] - 1))
    return float(scale)


@dataclass(kw_only=True)
class Current:
    """``Float8CurrentScalingQuantizer``."""

    dtype: torch.dtype = E4M3
    force_pow_2_scales: bool = False
    amax_epsilon: float = 0.0
    internal: bool = True
    with_amax_reduction: bool = False
    amax_reduction_group: Any = None
    rowwise: bool = True
    columnwise: bool = True
    calls: int = 0

    def copy(self) -> "Current":
        return replace(self)

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, x: torch.Tensor) -> Any:
        self.calls += 1
        assert not self.internal
        amax = x.abs().max().float()
        if self.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.amax_reduction_group)
        how = self.dtype, self.force_pow_2_scales, self.amax_epsilon
        scale = torch.tensor([scale_of(float(amax), *how)])
        return _quantized(x, scale, self)


class Given:
    """``Float8Quantizer``: the scale is known."""

    calls = 0  # of all of them

    def __init__(
        self,
        scale: torch.Tensor,
        amax: torch.Tensor,
        fp8_dtype: torch.dtype,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
    ):
        assert scale.shape == (1,)
        assert scale.dtype == torch.float32
        assert not amax.numel()
        self.scale, self.amax, self.dtype = scale, amax, fp8_dtype
        self.rowwise, self.columnwise, self.internal = rowwise, columnwise, False

    def copy(self) -> "Given":
        return Given(self.scale, self.amax, self.dtype)

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, x: torch.Tensor) -> Any:
        Given.calls += 1
        return _quantized(x, self.scale, self)


def _quantized(x: torch.Tensor, scale: torch.Tensor, quantizer: Any) -> Any:
    assert x.is_contiguous()
    narrow = (x.float() * scale).to(quantizer.dtype).view(torch.uint8)
    return SimpleNamespace(
        _data=narrow if quantizer.rowwise else None,
        _transpose=narrow.t().contiguous() if quantizer.columnwise else None,
        _scale_inv=1 / scale,
    )


def fields(**given: Any) -> Any:
    """``Float8Tensor``, of which what it was made of is looked at."""
    return SimpleNamespace(**given)


class Whole(torch.Tensor):
    """``Float8Tensor``, of which torch multiplies the values."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(**given: Any) -> "Whole":
        turned = given["data"] is None
        data = given["data_transpose"] if turned else given["data"]
        assert data.is_contiguous()  # its strides are not read
        values = data.view(given["fp8_dtype"]).float() * given["fp8_scale_inv"]
        values = (values.t() if turned else values).to(given["dtype"]).contiguous()
        assert values.shape == given["shape"]
        return values.as_subclass(Whole)

    def clear(self) -> None:
        self.data = self.new_empty(0)


def engine(tensor: Any = fields) -> Float8Engine:
    """What shards are quantized with."""
    return Float8Engine(tensor=tensor, quantizer=Given, kinds={E4M3: E4M3, E5M2: E5M2})


@contextmanager
def named() -> Iterator[None]:
    """These, where TransformerEngine's are imported from."""
    package, module, constants = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".pytorch.constants")
    )
    vars(module).update(
        Float8CurrentScalingQuantizer=Current, Float8Quantizer=Given, Float8Tensor=Whole.of
    )
    vars(constants).update(TE_DType_To_Torch=engine().kinds)
    modules = {each.__name__: each for each in (package, module, constants)}
    with mock.patch.dict(sys.modules, modules):
        yield

"""The three GEMMs of a linear whose weight is gathered.

TransformerEngine's functional GEMM on a GPU where it is installed, torch's elsewhere: the products
are then those of the TransformerEngine linears that the gathered ones stand in for.

The TransformerEngine branch ran in fp16 on one H100, four ranks over gloo, and on two over NCCL.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


def output(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T``: ``[..., D]`` by ``[F, D]``, contiguous or a transposed view: ``[..., F]``."""
    if gemm := _engine(x):
        stored, layout = _stored(weight, "TN", "NN")
        y = gemm(stored, _rows(x), out_dtype=x.dtype, layout=layout)[0]
        return y.view(*x.shape[:-1], -1)
    return x @ weight.t()


def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dY W``: ``[..., F]`` by ``[F, D]``, as in :func:`output`: ``[..., D]``."""
    if gemm := _engine(grad):
        stored, layout = _stored(weight, "NN", "TN")
        dx = gemm(stored, _rows(grad), out_dtype=grad.dtype, layout=layout, grad=True)[0]
        return dx.view(*grad.shape[:-1], -1)
    return grad @ weight


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``dY^T X``: ``[..., F]`` by ``[..., D]`` gives ``[F, D]``."""
    if gemm := _engine(grad):
        return gemm(_rows(x), _rows(grad), out_dtype=grad.dtype, layout="NT", grad=True)[0]
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


class Factor:
    """A factor of a weight's gradient, ``[..., F]``, of which some features are wanted.

    Attributes:
        matrix: two-dimensional; in FP8 that of the transposed data, which Hopper's GEMMs read.
        dim: along which its features lie.
        in_float8: whether it is TransformerEngine's, with one scale.
    """

    def __init__(self, whole: Any):
        self.whole, self.in_float8 = whole, _is_float8(whole)
        if self.in_float8:
            self.matrix, self.dim = whole._transpose.flatten(1), 0
        else:
            self.matrix, self.dim = whole.flatten(0, -2), 1

    def of(self, some: torch.Tensor) -> Any:
        """The factor with ``some`` of its features alone, rows or columns of the matrix."""
        if not self.in_float8:
            return some
        return _float8()(
            data=None,
            data_transpose=some,
            fp8_scale_inv=self.whole._scale_inv,
            fp8_dtype=self.whole._fp8_dtype,
        )


def add_weight_gradient(into: torch.Tensor, grad: Any, x: Any) -> None:
    """``into += dY^T X``; the product is not rounded on the way where a GEMM can add to it.

    Args:
        into: ``[F, D]``, contiguous; on a GPU in the dtype of ``x``, or in fp32.
        grad: ``[..., F]``, perhaps some columns of a matrix: torch's GEMM reads them where they
            are, TransformerEngine's would want a copy. Or in FP8, with a scale a tensor.
        x: ``[..., D]``, likewise.

    The FP8 branch cannot run on a CPU; it ran on two H200.
    """
    assert into.is_contiguous(), into.stride()  # TransformerEngine reads none
    if _is_float8(x):
        gemm = _general_gemm()
        how = {"layout": "NT", "grad": True, "accumulate": True, "use_split_accumulator": True}
        gemm(x, grad, out=into, out_dtype=into.dtype, **how)
        return
    grad, x = grad.flatten(0, -2).t(), x.flatten(0, -2)
    if into.dtype == x.dtype:
        into.addmm_(grad, x)
    elif x.device.type == "cuda":
        add: Any = torch.ops.aten.addmm.dtype_out
        add(into, grad, x, into.dtype, out=into)
    else:
        into += grad @ x


def _stored(weight: torch.Tensor, as_it_is: str, transposed: str) -> tuple[torch.Tensor, str]:
    """The matrix that lies in memory, and cuBLAS's word for the product with it."""
    return (weight, as_it_is) if weight.is_contiguous() else (weight.t(), transposed)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as the contiguous matrix that cuBLAS is handed; a gradient may be a view."""
    return x.flatten(0, -2).contiguous()


def _engine(x: torch.Tensor) -> Any:
    # TransformerEngine multiplies fp32 in TF32, which stock's local layers do not.
    half = x.dtype in (torch.float16, torch.bfloat16)
    return _general_gemm() if half and x.device.type == "cuda" else None


@cache
def _general_gemm() -> Any:
    if find_spec("transformer_engine") is None:
        return None
    from transformer_engine.pytorch.cpp_extensions import general_gemm  # type: ignore[import-not-found]

    return general_gemm


def _is_float8(x: Any) -> bool:
    return find_spec("transformer_engine") is not None and isinstance(x, _float8())


@cache
def _float8() -> Any:
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (  # type: ignore[import-not-found]
        Float8TensorStorage,
    )

    return Float8TensorStorage

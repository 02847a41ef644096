"""A linear that calls a distributed weight in the order of TransformerEngine's, on the CPU.

TransformerEngine 2.20.2, ``transformer_engine/pytorch``: ``distributed_weight.py`` is the protocol;
``module/linear.py`` calls it in ``_linear_forward_impl`` and ``_linear_backward_impl``,
``module/layernorm_linear.py`` in ``_LayerNormLinear.forward`` and ``.backward``. What both demand
of a weight is asserted here.
"""

from typing import Any

import torch

from megatron_helix.kernels.collectives import gather, scatter_sum
from megatron_helix.layers import linear
from megatron_helix.layers.engine import EngineLinear


def _is_distributed(weight: Any) -> bool:
    """``distributed_weight.is_distributed_weight``."""
    return bool(getattr(weight, "is_distributed_weight", False)) and isinstance(
        weight, torch.Tensor
    )


class _Multiply(torch.autograd.Function):
    """``_Linear`` and ``_LayerNormLinear`` behind the norm; saves the input, as it is sharded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, engine: Any) -> torch.Tensor:
        ctx.group, ctx.column = engine.tp_group, engine.column
        ctx.gathers = engine.column and engine.sequence_parallel
        ctx.scatters = not engine.column and engine.sequence_parallel
        assert engine.tp_size == engine.tp_group.size()
        assert x.shape[-1] == weight.shape[-1], "GEMM not possible"
        ctx.save_for_backward(x, weight)
        assert not engine.fuse_wgrad_accumulation
        ctx.bias, ctx.store = bias is not None, engine.wgrad_store
        whole = weight
        if _is_distributed(weight):
            whole = weight.materialize_group_for_forward()
        assert whole.is_contiguous()  # its strides are not read
        # LayerNormLinear asks the matrix, not the parameter, and keeps it.
        assert whole.requires_grad == weight.requires_grad
        ctx.kept = whole
        y = (gather(x, ctx.group) if ctx.gathers else x) @ whole.t()
        if bias is not None:
            y = y + bias
        return scatter_sum(y, ctx.group) if ctx.scatters else y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, saved = ctx.saved_tensors
        whole, distributed = saved, _is_distributed(saved)
        if distributed:
            assert ctx.kept.untyped_storage().nbytes() == 0, "the gathered weight is still there"
            whole = saved.materialize_group_for_backward()
        assert whole.is_contiguous()
        grad = gather(grad, ctx.group) if ctx.scatters else grad
        x = gather(x, ctx.group) if ctx.gathers else x
        dgrad = grad @ whole
        dgrad = scatter_sum(dgrad, ctx.group) if ctx.gathers else dgrad
        wgrad = bgrad = None
        if saved.requires_grad and ctx.store is not None and ctx.store.delay_wgrad_compute():
            ctx.store.put([x, grad], None)  # and with the product goes the bias' gradient
        elif saved.requires_grad:
            wgrad = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            bgrad = grad.flatten(0, -2).sum(0) if ctx.bias else None
            if distributed:
                wgrad = saved.finalize_group_grads(wgrad)
                assert wgrad is None or wgrad.shape == saved.shape
        return dgrad, wgrad, bgrad, None


class EngineStandIn(torch.nn.Module):
    """What Megatron's subclasses of TransformerEngine's linears are to a subclass of theirs."""

    column: bool
    fp8 = False
    te_return_bias = False

    def __init__(self, input_size: int, output_size: int, **given: Any):
        super().__init__()
        group, dtype = given["tp_group"], given["config"].params_dtype
        ranks = group.size()
        cut = (
            (output_size // ranks, input_size)
            if self.column
            else (output_size, input_size // ranks)
        )
        self.weight = torch.nn.Parameter(torch.empty(cut, dtype=dtype))
        given["init_method"](self.weight)
        self.bias = torch.nn.Parameter(torch.randn(cut[0], dtype=dtype)) if given["bias"] else None
        self.tp_group, self.tp_size, self.sequence_parallel = group, ranks, True
        self.fuse_wgrad_accumulation = self.disable_parameter_transpose_cache = False
        self.is_first_microbatch, self.wgrad_store = True, None

    def _get_weight_and_bias_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``TELinear.forward`` and ``Linear.forward``."""
        weight, bias = self._get_weight_and_bias_tensors()
        y = _Multiply.apply(x, weight, bias if self.column else None, self)
        self.is_first_microbatch = False
        return (y if self.column or bias is None else y + bias), None


class _Column(EngineStandIn):
    column = True


class _Row(EngineStandIn):
    column = False


STAND_INS = {"linear_qkv": _Column, "linear_proj": _Row, "linear_fc1": _Column, "linear_fc2": _Row}


def engine_class(name: str) -> type:
    """The helix linear ``name`` on a stand-in of TransformerEngine's."""
    return type(f"Engine_{name}", (linear._ENDS[name], EngineLinear, STAND_INS[name]), {})


def oracle_class(name: str) -> type:
    """The same, multiplied by the torch path."""
    return type(f"Oracle_{name}", (linear._ENDS[name], STAND_INS[name]), {})

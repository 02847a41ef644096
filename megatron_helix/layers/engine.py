"""TransformerEngine's linears with the weight of a head group in place of their own.

They norm, multiply, add the bias and scale to FP8 by their own kernels; what they multiply with is
a :class:`~megatron_helix.exchange.distributed_weight.DistributedShard`, gathered over the dim axis.
Tokens move by their own sequence parallelism, over the head-axis group for as long as a forward
pass lasts: a context remembers for its backward pass.

TransformerEngine 2.19 is the first that knows such weights. Written against 2.20.2; on two H200
its linears gave the torch path's outputs and gradients, in bf16 and in FP8. In the tests its
modules run on the CPU, with torch's GEMMs and norms in place of its kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange.distributed_weight import FactorStore

Lend = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


def takes_gathered_weights(linear: type) -> bool:
    """Whether ``linear`` is one of TransformerEngine's, of a version that knows such weights."""
    ours = any(base.__module__.startswith("transformer_engine.") for base in linear.__mro__)
    return ours and _knows_them()


@cache
def _knows_them() -> bool:
    return find_spec("transformer_engine.pytorch.distributed_weight") is not None


class EngineLinear(torch.nn.Module):
    """Mixin before a linear of TransformerEngine's."""

    is_first_microbatch: bool
    _lend: Lend | None = None

    def multiply(
        self, x: torch.Tensor, lend: Lend, tokens: dist.ProcessGroup, factors: FactorStore
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward pass with another weight.

        Args:
            x: input, sharded over ``tokens`` where the linear is column-parallel.
            lend: weight and bias, asked for once FP8 is set up.
            tokens: the ranks that x, or the output, is sharded over.
            factors: takes those of the weight's gradient, where that is not wanted whole.

        Returns:
            (output, bias that was not added), as Megatron's linears.
        """
        ranks = tokens.size()
        lent = {
            "_lend": lend,
            "tp_group": tokens,
            "tp_size": ranks,
            "sequence_parallel": ranks > 1,
            "fuse_wgrad_accumulation": False,
            "wgrad_store": factors,
            # What the module keeps in FP8 over a step's micro-batches is of its own weight.
            "disable_parameter_transpose_cache": True,
            "is_first_microbatch": self.is_first_microbatch,
        }
        with _for_now(self, lent):
            return super().forward(x)

    def weight_quantizer(self) -> Any:
        """TransformerEngine's for the weight, while it is asked to lend; None without FP8."""
        found: Any = self
        return found._get_weight_quantizers()[0] if found.fp8 else None

    def _get_weight_and_bias_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What TransformerEngine's forward asks for, in all of its linears."""
        if self._lend is not None:
            return self._lend()
        return super()._get_weight_and_bias_tensors()  # type: ignore[misc]


def in_float8() -> bool:
    """Whether Megatron has TransformerEngine multiply in FP8 here."""
    from transformer_engine.pytorch.quantization import (  # type: ignore[import-not-found]
        FP8GlobalStateManager,
    )

    return FP8GlobalStateManager.is_fp8_enabled()


@contextmanager
def _for_now(module: torch.nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Plain attributes of a module, with other values for a while."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(module)[name]
        vars(module).update(before)

"""The forms in which a linear gathers its weight, and the embedding its table."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange.float8 import (
    Float8Engine,
    Float8Shard,
    Float8Weight,
    QuantizedWhole,
)
from megatron_helix.exchange.float8_scales import Scales
from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.step_sums import StepSums

Pair = tuple[GatheredWeight, GatheredWeight]


class WeightForms:
    """Of one parameter: what a forward pass gathers, and the backward pass after it.

    Args:
        shard: the parameter.
        shards: how the shards of the dim group make the whole.
        dim: the m ranks that hold them.
        home: the same, over which gradients go.
        engine: whether the linear is TransformerEngine's, whose GEMMs read rows.
        scales: with which weights it agrees on scales in FP8; alone where None.

    Attributes:
        keeps: whether what is gathered is to be kept for the step.
        keeps_gradients: whether their sums are, too.
        turned: for GEMMs that read a matrix either way; shards cut by columns travel transposed.
        lying: for GEMMs that read rows.
        sums: of a step's gradients.
        forward: what the last forward pass gathered; None before the first one of an engine's
            linear, which sees only then whether it multiplies in FP8.
        backward: the same of its backward pass.
    """

    def __init__(
        self,
        shard: torch.nn.Parameter,
        shards: Shards,
        dim: dist.ProcessGroup,
        home: dist.ProcessGroup,
        *,
        engine: bool,
        scales: Scales | None = None,
    ) -> None:
        self.shard, self.shards, self.dim, self.home = shard, shards, dim, home
        rows = replace(shards, as_they_lie=True)
        self.turned = GatheredWeight(shard, shards, dim, home)
        self.lying = GatheredWeight(shard, rows, dim, home) if shards.axis else self.turned
        self.sums = StepSums(shard, shards, home)
        self.keeps = self.keeps_gradients = False
        self.forward = self.backward = None if engine else self.turned
        self._scales = scales
        self._float8: Float8Shard | None = None
        self._one_scale: Pair | None = None
        self._blocks: tuple[QuantizedWhole, QuantizedWhole] | None = None

    def keep(self, plan: Plan, *, training: bool) -> None:
        """Keep of a step what a micro-batch's plan says; nothing while there is no step."""
        self.keeps = plan.keeps_weights and training
        self.keeps_gradients = plan.keeps_gradients and training

    def either_way(self) -> GatheredWeight:
        """For GEMMs that read it either way, in both passes."""
        return self.used(self.turned, self.turned)[0]

    def used(self, forward: GatheredWeight, backward: GatheredWeight) -> Pair:
        """Note what this pass gathers: its neighbours in later passes begin with it."""
        self.forward, self.backward = forward, backward
        forward.keeps = backward.keeps = self.keeps
        forward.sums = backward.sums = self.sums if self.keeps_gradients else None
        return forward, backward

    def for_engine(self, quantizer: Any) -> Pair:
        """What TransformerEngine's GEMMs read, by its quantizer for the weight; None for none."""
        if quantizer is None:
            return self.used(self.lying, self.lying)
        return self.used(
            *(self._scaled if _has_one_scale(type(quantizer)) else self._quantized)(quantizer)
        )

    def takes_factors(self, quantizer: Any) -> bool:
        """Whether gradients are added to a step's sums by GEMMs: not those of blocks of FP8."""
        return self.keeps_gradients and (quantizer is None or _has_one_scale(type(quantizer)))

    def finish_step(self) -> None:
        """Bring gradients home, and forget what is of the weight before an update."""
        self.sums.finish()
        if self._float8 is not None:
            self._float8.expire()
        for form in (self.turned, self.lying, *(self._one_scale or ()), *(self._blocks or ())):
            form.forget()

    def _scaled(self, quantizer: Any) -> Pair:
        if self._float8 is None or self._one_scale is None:
            self._float8 = Float8Shard(
                self.shard,
                self.dim,
                _engine(),
                columns=self.shards.axis == 1,
                scales=self._scales,
            )
            rows = replace(self.shards, as_they_lie=True)
            forward = Float8Weight(self.shard, rows, self._float8, self.home)
            turned = Float8Weight(self.shard, self.shards, self._float8, self.home)
            self._one_scale = (forward, turned if self.shards.axis else forward)
        self._float8.adopt(quantizer)
        return self._one_scale

    def _quantized(self, quantizer: Any) -> Pair:
        if self._blocks is None:
            rows = replace(self.shards, as_they_lie=True)
            passes = (False, True)
            forward, backward = (
                QuantizedWhole(self.shard, rows, self.dim, self.home, columns=columns)
                for columns in passes
            )
            self._blocks = forward, backward
        for form in self._blocks:
            form.adopt(quantizer)
        return self._blocks


def finish_step(model: list[torch.nn.Module]) -> None:
    """Bring home the gradients of weights that were gathered for a step; forget what was kept."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(forms := getattr(module, "forms", None), WeightForms):
                forms.finish_step()


@cache
def _has_one_scale(quantizer: type) -> bool:
    """Whether FP8 with a scale a tensor, delayed or current."""
    from transformer_engine.pytorch import (  # type: ignore[import-not-found]
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )

    return issubclass(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer))


def _engine() -> Float8Engine:
    from transformer_engine.pytorch import (  # type: ignore[import-not-found]
        Float8Quantizer,
        Float8Tensor,
    )
    from transformer_engine.pytorch.constants import (  # type: ignore[import-not-found]
        TE_DType_To_Torch,
    )

    return Float8Engine(tensor=Float8Tensor, quantizer=Float8Quantizer, kinds=TE_DType_To_Torch)

"""The scales of all weights in FP8 of a step, agreed on in one go: current scaling.

TransformerEngine finds the largest value of a weight, reduces it over the dim group, makes a scale
of it and quantizes, one weight after the other: four kernels and a collective each, in a
micro-batch in which the host has no lead. Here the first weight of a step that is quantized does
the first three for all of them: the largest values in one call, one all-reduce of as many numbers.

Who takes part is not negotiated. It follows from what this rank did before: a weight takes part
once a pass has shown how it is quantized, and until the step's end it has its scale. Ranks of a dim
group hold shards of the same weights and use them in the same order, or their gathers would not
meet; so they come to the same collectives. A first step, and a weight that is new in a later one,
agrees on it alone.

All shards must be up to date when the first of them is used, and stay so until the step's end.
Where Megatron gathers parameters during the forward pass (``--overlap-param-gather``) they are not,
and nothing is shared.

On one H200 a rank alone has TransformerEngine's bytes and scales to the last bit, and its host
needs 3.3 to 3.6 ms a step for 64 weights, one by one 4.8 (docs/exactness.md).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

LARGEST = torch.finfo(torch.float32).max
EXPONENT = -0x800000  # sign and exponent of an fp32 number, as a mask of its bits


@dataclass(frozen=True)
class Rule:
    """How current scaling makes a scale of a weight's largest value, as TransformerEngine does.

    Its ``compute_scale_from_amax``, equal to the last bit (2.20.2).

    Attributes:
        kind: the numbers to scale to.
        power_of_2: whether scales are rounded down to a power of two.
        epsilon: taken for a largest value that is smaller.
    """

    kind: torch.dtype
    power_of_2: bool
    epsilon: float

    @classmethod
    def of(cls, quantizer: Any, kind: torch.dtype) -> "Rule":
        """That of TransformerEngine's ``Float8CurrentScalingQuantizer``."""
        return cls(kind, quantizer.force_pow_2_scales, quantizer.amax_epsilon)

    def scales(self, largest: torch.Tensor) -> torch.Tensor:
        """Of as many weights; 1 for a weight of zeros, or with a value that is not finite.

        Args:
            largest: absolute values, fp32, ``[weights]``.
        """
        largest = largest.clamp(min=self.epsilon)
        # A number over a tensor would be a product with the reciprocal, which rounds twice.
        scales = torch.full_like(largest, torch.finfo(self.kind).max) / largest
        scales = scales.clamp(max=LARGEST)
        if self.power_of_2:
            scales = (scales.view(torch.int32) & EXPONENT).view(torch.float32)
        return scales.where((largest > 0) & largest.isfinite(), 1.0)


class Scaled(Protocol):
    """A shard whose scale is agreed on.

    Attributes:
        shard: the parameter.
        dim: the ranks that hold the others.
        rule: None while it is not scaled by its largest value.
        scale: this step's, fp32, ``[1]``; None before it is agreed on.
    """

    shard: torch.nn.Parameter
    dim: dist.ProcessGroup
    rule: Rule | None
    scale: torch.Tensor | None


class Scales:
    """What the weights of a model share to agree on their scales together."""

    def __init__(self) -> None:
        self._shards: dict[Scaled, None] = {}  # in order of their first use

    def enter(self, shard: Scaled) -> None:
        """From now on ``shard`` takes part; where it does already, nothing changes."""
        self._shards[shard] = None

    def agree(self, dim: dist.ProcessGroup) -> None:
        """Give every shard over ``dim`` that has no scale its own; one all-reduce over ``dim``."""
        rules = {
            shard: shard.rule
            for shard in self._shards
            if shard.dim is dim and shard.rule is not None and shard.scale is None
        }
        # Exact in any precision: what is the largest is one of the values. NaN is one of them here;
        # TransformerEngine passes over it, and quantizes it with the scale of the others.
        weights = [shard.shard.detach() for shard in rules]
        values = torch._foreach_norm(weights, float("inf"))  # type: ignore[attr-defined]
        largest = torch.stack(values).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dim)
        scales = {rule: rule.scales(largest).split(1) for rule in {*rules.values()}}
        for place, (shard, rule) in enumerate(rules.items()):
            shard.scale = scales[rule][place]

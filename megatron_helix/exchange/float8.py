"""The weight of a head group in FP8: quantized where its shards lie, gathered in half the bytes.

With one scale a tensor a shard can be quantized before it is sent, if the ranks of the dim group
agree on the scale. Delayed scaling takes it from earlier steps' largest values, which Megatron
reduces over groups that hold the dim group. Current scaling reduces the largest value of the
shards over the dim group: the scale is that of the head group's weight, as a rank that had all of
it would find. Those of all weights are reduced together where they can be
(:mod:`megatron_helix.exchange.float8_scales`). A step's weights are quantized once.

With a scale a block of 128 x 128 the blocks are those of the whole weight, which shards of
attention's heads do not hold: the weight is gathered as it is and quantized whole.

Hopper multiplies FP8 only by rows on both sides: the forward GEMM reads the weight ``[out, in]``,
that of the input gradient its transpose. A shard that is cut by columns has travelled transposed
for the latter, and as it lies for the former.

Run on one and two H200 (docs/exactness.md); in the tests, on the CPU, with quantizers of torch's
float8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange.float8_scales import Rule, Scales
from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.exchange.shards import Shards


@dataclass(frozen=True, kw_only=True)
class Float8Engine:
    """What of TransformerEngine's is used of FP8 with one scale.

    Attributes:
        tensor: its ``Float8Tensor``.
        quantizer: its ``Float8Quantizer``, for a scale that is known.
        kinds: torch's name for each kind of number of its own.
    """

    tensor: Callable[..., Any]
    quantizer: Callable[..., Any]
    kinds: Mapping[Any, torch.dtype]


class Float8Shard:
    """This rank's shard in FP8, quantized once a step.

    Args:
        shard: the parameter.
        dim: the ranks that agree on its scale.
        engine: what quantizes it.
        columns: whether the transposed shard is wanted as well.
        scales: with which weights current scaling agrees on scales; alone where None.

    Attributes:
        quantizer: how to quantize; None before a pass has shown it.
        rule: what its scale is made by, where that is agreed on with others.
        scale: agreed on so for this step.
    """

    quantizer: Any = None
    rule: Rule | None = None
    scale: torch.Tensor | None = None
    _adopted: Any = None
    _quantized: Any = None

    def __init__(
        self,
        shard: torch.nn.Parameter,
        dim: dist.ProcessGroup,
        engine: Float8Engine,
        *,
        columns: bool,
        scales: Scales | None = None,
    ):
        self.shard, self.dim, self.engine = shard, dim, engine
        self.columns, self.scales = columns, scales

    def adopt(self, quantizer: Any) -> None:
        """Quantize as TransformerEngine's ``quantizer`` of the module does, over ``dim``."""
        if quantizer is self._adopted:
            return
        mine = quantizer.copy()
        mine.internal = False
        mine.set_usage(rowwise=True, columnwise=False)
        self.quantizer, self._adopted, self.rule = mine, None, None
        if hasattr(mine, "amax_reduction_group"):
            mine.with_amax_reduction, mine.amax_reduction_group = True, self.dim
            self._adopted = quantizer  # that of delayed scaling gets other tensors as it goes
            if self.scales is not None:
                self.rule = Rule.of(mine, self.engine.kinds[mine.dtype])
                self.scales.enter(self)

    def quantized(self) -> Any:
        """The shard, by rows and perhaps transposed, with its scale."""
        if self._quantized is None:
            shard = self.shard.detach()
            if self.rule is None or self.scales is None:
                self._quantized = self._alone(shard)
            else:
                self._quantized = self._together(shard, self.scales)
        return self._quantized

    def _alone(self, shard: torch.Tensor) -> Any:
        self.quantizer.set_usage(rowwise=True, columnwise=self.columns)
        quantized = self.quantizer(shard)
        self.quantizer.set_usage(rowwise=True, columnwise=False)
        return quantized

    def _together(self, shard: torch.Tensor, scales: Scales) -> Any:
        if self.scale is None:
            scales.agree(self.dim)
        quantizer = self.engine.quantizer(
            scale=self.scale,
            amax=torch.Tensor(),  # asks for none, as in TransformerEngine's own parameters in FP8
            fp8_dtype=self.quantizer.dtype,
            columnwise=self.columns,
        )
        quantizer.internal = True  # nobody but this class sees what it gives
        return quantizer(shard)

    def expire(self) -> None:
        """Forget the quantized shard: the parameter is about to change."""
        self._quantized = None  # the next step's
        self.scale = None  # of what it was


class Float8Weight(GatheredWeight):
    """Gathered in FP8, one scale for the whole.

    Args:
        source: the quantized shard.
        shards: how the shards make the whole.
        home: as for the parent.
    """

    def __init__(
        self,
        shard: torch.nn.Parameter,
        shards: Shards,
        source: Float8Shard,
        home: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(shard, shards, source.dim, home)
        self.source = source

    @property
    def may_start(self) -> bool:
        """As for the parent, once it is known how to quantize."""
        return self.source.quantizer is not None and super().may_start

    def whole(self) -> torch.Tensor:
        """The head group's weight, by rows or, where shards travel turned, transposed."""
        gathered, shards = super().whole(), self.shards
        data, turned = (None, gathered.t()) if shards.turns else (gathered, None)
        return self.source.engine.tensor(
            shape=gathered.shape,
            dtype=self.shard.dtype,
            data=data,
            data_transpose=turned,
            fp8_scale_inv=self.source.quantized()._scale_inv,
            fp8_dtype=self.source.quantizer.dtype,
            quantizer=self.source.quantizer,
            device=gathered.device,
        )

    def empty(self, whole: Any) -> None:
        """As for the parent."""
        whole.clear()

    def _sent(self) -> torch.Tensor:
        quantized = self.source.quantized()
        return quantized._transpose.t() if self.shards.turns else quantized._data


class QuantizedWhole(GatheredWeight):
    """Gathered as it is, and quantized whole: by rows, and for a backward pass by columns too.

    Args:
        columns: whether for a backward pass.
    """

    quantizer: Any = None

    def __init__(
        self,
        shard: torch.nn.Parameter,
        shards: Shards,
        dim: dist.ProcessGroup,
        home: dist.ProcessGroup | None = None,
        *,
        columns: bool,
    ) -> None:
        super().__init__(shard, shards, dim, home)
        self.columns = columns

    def adopt(self, quantizer: Any) -> None:
        """Quantize as TransformerEngine's ``quantizer`` of the module does."""
        self.quantizer = quantizer.copy()
        self.quantizer.internal = False

    def whole(self) -> torch.Tensor:
        """The head group's weight, in FP8."""
        self.quantizer.set_usage(rowwise=True, columnwise=self.columns)
        return self.quantizer(super().whole())

    def empty(self, whole: Any) -> None:
        """As for the parent."""
        whole.clear()

"""The weight of a head group in FP8: quantized where its shards lie, gathered in half the bytes.

With one scale a tensor a shard can be quantized before it is sent, if the ranks of the dim group
agree on the scale. Delayed scaling takes it from earlier steps' largest values, which Megatron
reduces over groups that hold the dim group. Current scaling reduces the largest value of the
shards over the dim group: the scale is that of the head group's weight, as a rank that had all of
it would find. A step's weights are quantized once.

With a scale a block of 128 x 128 the blocks are those of the whole weight, which shards of
attention's heads do not hold: the weight is gathered as it is and quantized whole.

Hopper multiplies FP8 only by rows on both sides: the forward GEMM reads the weight ``[out, in]``,
that of the input gradient its transpose. A shard that is cut by columns has travelled transposed
for the latter, and as it lies for the former.

Run on one and two H200 (docs/exactness.md); in the tests, on the CPU, with quantizers of torch's
float8.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.exchange.shards import Shards

Wrap = Callable[..., torch.Tensor]


class Float8Shard:
    """This rank's shard in FP8, quantized once a step.

    Args:
        shard: the parameter.
        dim: the ranks that agree on its scale.
        columns: whether the transposed shard is wanted as well.
    """

    _quantized: Any = None

    def __init__(self, shard: torch.Tensor, dim: dist.ProcessGroup, *, columns: bool):
        self.shard, self.dim, self.columns = shard, dim, columns
        self.quantizer: Any = None

    def adopt(self, quantizer: Any) -> None:
        """Quantize as TransformerEngine's ``quantizer`` of the module does, over ``dim``."""
        mine = quantizer.copy()
        mine.internal = False
        if hasattr(mine, "amax_reduction_group"):
            mine.with_amax_reduction, mine.amax_reduction_group = True, self.dim
        mine.set_usage(rowwise=True, columnwise=False)
        self.quantizer = mine

    def quantized(self) -> Any:
        """The shard, by rows and perhaps transposed, with its scale."""
        if self._quantized is None:
            self.quantizer.set_usage(rowwise=True, columnwise=self.columns)
            self._quantized = self.quantizer(self.shard.detach())
            self.quantizer.set_usage(rowwise=True, columnwise=False)
        return self._quantized

    def expire(self) -> None:
        """Forget the quantized shard: the parameter is about to change."""
        self._quantized = None  # the next step's


class Float8Weight(GatheredWeight):
    """Gathered in FP8, one scale for the whole.

    Args:
        source: the quantized shard.
        shards: how the shards make the whole.
        wrap: TransformerEngine's ``Float8Tensor``.
        home: as for the parent.
    """

    def __init__(
        self,
        shard: torch.nn.Parameter,
        shards: Shards,
        source: Float8Shard,
        wrap: Wrap,
        home: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(shard, shards, source.dim, home)
        self.source, self.wrap = source, wrap

    def start(self) -> None:
        """As for the parent, once it is known how to quantize."""
        if self.source.quantizer is not None:
            super().start()

    def whole(self) -> torch.Tensor:
        """The head group's weight, by rows or, where shards travel turned, transposed."""
        gathered, shards = super().whole(), self.shards
        data, turned = (None, gathered.t()) if shards.turns else (gathered, None)
        return self.wrap(
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

"""The ``scores`` exchange: partial attention scores move over the dim axis.

The literal two-level method. A rank projects all tokens onto its tile and keeps its segment of the
head dimension throughout; a score is a sum over segments::

    S[b, H_n, s, s] = sum_j Q_j[s, b, H_n, d_m] K_j[s, b, K_n, d_m]^T    all-reduce over the dim
    group O[s, b, H_n, d_m] = softmax(S / sqrt(d)) V_j[s, b, K_n, d_m]         no communication

Elements a rank sends forward: ``2 (m-1)/m * b * H/n * s^2``, in fp32; backward as many. It rules
out fused attention kernels, which never hold S; it is for short contexts and as a check on the
others.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels.collectives import all_reduce
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.process_groups import HelixGroups


class ScoresAttention(DotProductAttention):
    """Core attention on one segment of the head dimension, with the scores summed over segments.

    Mask, softmax (with its learnable offset) and dropout are Megatron's, applied in fp32 to whole
    scores. The ranks of a dim group hold the same scores and drop the same; each head group has a
    mask of its own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, groups: HelixGroups, **kwargs: Any):
        config = copy.copy(config)
        config.masked_softmax_fusion = False  # its kernels take half precision, scores are fp32
        super().__init__(config, *args, **kwargs)
        self.helix_groups = groups

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """``[sq, b, H/n, d/m]``, twice ``[sk, b, K/n, d/m]`` -> ``[sq, b, H/n * d/m]``.

        Raises:
            UserError: for an attention bias.
        """
        if attention_bias is not None:
            raise UserError(
                "--helix-exchange: scores takes no attention bias; use activations or weights"
            )
        sq, b, heads, _ = query.shape
        repeats = heads // key.size(2)
        key = key.repeat_interleave(repeats, dim=2)
        value = value.repeat_interleave(repeats, dim=2)
        partial = torch.einsum("sbhd,tbhd->bhst", query.float(), key.float()) * self.softmax_scale
        scores = all_reduce(partial, self.helix_groups.dim)
        probabilities = self.scale_mask_softmax(scores, attention_mask, self.softmax_offset)
        probabilities = self._dropout(probabilities).to(value.dtype)
        context = torch.einsum("bhst,tbhd->sbhd", probabilities, value)
        return context.reshape(sq, b, -1)

    def _dropout(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Dropout under a seed of the head group, the same on all ranks that have it.

        Megatron has no state that a dim group shares alone. The data-parallel one is common to the
        whole tensor-parallel group: every rank draws from it a seed for each head group. No mask
        comes from it directly, for it starts as the state does that the stream is dropped by.
        """
        if not (self.training and self.attention_dropout.p):
            return probabilities
        groups = self.helix_groups
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            seeds = torch.randint(1 << 62, (groups.head.size(),), device=probabilities.device)
            drawn = torch.cuda.get_rng_state()
            torch.cuda.manual_seed(int(seeds[groups.head_group]))
            dropped = self.attention_dropout(probabilities)
            torch.cuda.set_rng_state(drawn)
        return dropped


class SegmentNorm(torch.nn.Module):
    """A norm over the head dimension, of which this rank holds one segment.

    Takes over the parameters of a stock norm (LayerNorm, RMSNorm or the parameterless L2 norm)
    under their own names. The statistics are sums over channels, all-reduced over the dim group in
    fp32; the gradient of the weight is that of this segment, which Megatron sums over the
    tensor-parallel group.
    """

    def __init__(
        self,
        norm: torch.nn.Module,
        *,
        centered: bool,
        eps: float,
        zero_centered_gamma: bool,
        layout: HelixLayout,
        groups: HelixGroups,
    ):
        super().__init__()
        self.weight = getattr(norm, "weight", None)
        self.bias = getattr(norm, "bias", None)
        self.centered, self.eps, self.offset = centered, eps, float(zero_centered_gamma)
        self.dim_group: dist.ProcessGroup = groups.dim
        self.kv_channels = layout.kv_channels
        self.channels = layout.segment_channels(groups.segment)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d/m] -> [..., d/m]``."""
        values = x.float()
        if self.centered:
            values = values - self._mean(values)
        values = values * torch.rsqrt(self._mean(values.square()) + self.eps)
        if self.weight is not None:
            values = values * (self.weight[self.channels].float() + self.offset)
        if self.bias is not None:
            values = values + self.bias[self.channels]
        return values.to(x.dtype)

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over all d channels, of which this rank sums its own."""
        return all_reduce(values.sum(-1, keepdim=True), self.dim_group) / self.kv_channels


def segment_frequencies(
    frequencies: torch.Tensor | None, layout: HelixLayout, segment: int
) -> torch.Tensor | None:
    """Rotary frequencies ``[s, 1, 1, rotary_dim]`` of this segment's channels.

    A segment is closed under rotation pairs and its rotated channels come first, so the stock
    rotation applies to it as it stands.
    """
    if frequencies is None:
        return None
    assert frequencies.size(-1) == layout.rotary_dim, (frequencies.shape, layout.rotary_dim)
    channels = layout.segment_channels(segment)
    return frequencies[..., channels[channels < layout.rotary_dim].to(frequencies.device)]

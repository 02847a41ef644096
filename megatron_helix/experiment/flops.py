"""Floating-point operations: of a model by formula, and of a rank as torch counts them.

A matrix product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` operations. For one token, forward:

========================  ================================
QKV and output            ``2 D (2 H + 2 K) d``
scores and their use      ``4 s H d``, all s positions
MLP                       ``2 (2 or 3) D F``, times the experts a token is sent to
router                    ``2 D E``
vocabulary                ``2 D V``
========================  ================================

with D hidden, H heads, K query groups, d head dimension, s sequence, F MLP features, E experts, V
the vocabulary. A backward pass is twice a forward pass. Attention counts in full although the
causal half would do, as is usual for model FLOPs utilisation. Source: Chowdhery et al., "PaLM"
(2022), appendix B; Narayanan et al., "Efficient large-scale language model training" (2021).
"""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from megatron_helix.run_config import BatchConfig, ModelConfig

FORMULA = (
    "FLOPs of a token, forward: layers x (2 D (2 H + 2 K) d + 4 s H d + 2 (2, gated 3) D F x"
    " active experts + 2 D E) + 2 D V; training is three times that"
)


def model_flops(model: ModelConfig, batch: BatchConfig, vocabulary: int, phase: str) -> float:
    """Operations of one step of the whole model."""
    D, F, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    H = model.num_attention_heads
    K = model.num_query_groups or H
    experts = model.num_experts or 0
    attention = 2 * D * (2 * H + 2 * K) * d + 4 * batch.sequence_length * H * d
    mlp = 2 * (3 if model.swiglu else 2) * D * F * (model.moe_router_topk if experts else 1)
    layer = attention + mlp + 2 * D * experts
    token = model.num_layers * layer + 2 * D * vocabulary
    return float(token * batch.tokens * (3 if phase == "train" else 1))


class FlopCounter(TorchDispatchMode):
    """Counts the matrix products and attentions that run in this process, backward pass included.

    Kernels that torch does not dispatch (TransformerEngine's) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation; add what it counts."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count:
            with _disable_current_modes():
                self.total += count(*args, **(kwargs or {}), out_val=out)
        return out

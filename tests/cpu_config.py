"""A ``TransformerConfig`` for layers that are built directly, with what a CPU does without."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig


def cpu_config(**fields: Any) -> TransformerConfig:
    """Local layers, weights drawn on the CPU, no dropout and no fused kernels."""
    return TransformerConfig(
        **{
            "transformer_impl": "local",
            "use_cpu_initialization": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            **fields,
        }
    )

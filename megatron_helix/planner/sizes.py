"""What is made of a model's sizes by who shares it: its partition, rows of its embedding."""

from megatron_helix.partition.layout import HelixLayout
from megatron_helix.run_config.model import ModelConfig

VOCAB_MULTIPLE = 16  # as experiments set --make-vocab-size-divisible-by


def padded_rows(vocabulary: int, ranks: int) -> int:
    """Rows of an embedding for so many tokens that ``ranks`` share, as Megatron pads them."""
    unit = VOCAB_MULTIPLE * ranks
    return -(-vocabulary // unit) * unit


def layout_of(model: ModelConfig, m: int, n: int, groups: int = 0) -> HelixLayout:
    """The m x n partition of a model.

    Args:
        model: the model.
        m: segments of a head.
        n: head groups.
        groups: query groups, where they are repeated; the model's by default.

    Raises:
        UserError: when it cannot be cut so.
    """
    return HelixLayout(
        m=m,
        n=n,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=groups or model.query_groups,
        kv_channels=model.kv_channels,
        rotary_dim=model.rotary_dim,
        rotary_interleaved=model.rotary_interleaved,
    )

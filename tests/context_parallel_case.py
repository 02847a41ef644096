"""Core attention under context parallelism that a CPU can run, as a layer spec for ``--spec``.

Megatron leaves context parallelism to TransformerEngine's kernels. This one gathers keys and values
over the context-parallel group and masks by position: the same attention, without the ring.
"""

import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.kernels.collectives import all_gather, gather
from tests.local_spec import with_core_attention


class GatheredContext(DotProductAttention):
    """``query, key, value [s/cp, b, heads, d]``, causal over the whole sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **kw: Any,
    ):
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the stock class refuses more
        kw.pop("cp_comm_type", None)
        super().__init__(alone, *args, pg_collection=pg_collection, **kw)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        group = self.context_group
        every = torch.arange(group.size() * query.size(0))
        own = get_pos_emb_on_this_cp_rank(every, 0, group)  # a position is its own embedding
        key, value = (all_gather(part.contiguous(), group) for part in (key, value))
        hidden = gather(own, group)[None, :] > own[:, None]
        return super().forward(query, key, value, hidden[None, None], **kwargs)


def layer_spec(config: Any) -> Any:
    """Megatron's local layer spec with this core attention; ``config`` is a ``GPTModelConfig``."""
    return with_core_attention(GatheredContext)

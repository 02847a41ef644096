"""Core attention over packed documents that a CPU can run, as a layer spec for ``--spec``.

Megatron leaves rows of several documents to TransformerEngine; its local attention refuses them.
This one masks them apart.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

from tests.local_spec import with_core_attention


class DocumentsApart(DotProductAttention):
    """``query, key, value [tokens, heads, d]``, causal within each document."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        every = torch.arange(query.size(0))
        ends = packed_seq_params.cu_seqlens_q
        assert ends is not None
        document = torch.bucketize(every, ends.to(every.dtype), right=True)
        hidden = (document[:, None] != document) | (every[:, None] < every)
        assert packed_seq_params.max_seqlen_q == int(ends.diff().max())
        rows = (part.unsqueeze(1) for part in (query, key, value))
        return super().forward(*rows, hidden[None, None], *args, **kwargs).squeeze(1)


def layer_spec(config: Any) -> Any:
    """Megatron's local layer spec with this core attention; ``config`` is a ``GPTModelConfig``."""
    return with_core_attention(DocumentsApart)

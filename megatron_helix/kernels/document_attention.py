"""Core attention of Megatron's local implementation that keeps packed documents apart.

Megatron leaves rows of several documents (THD) to TransformerEngine, which needs a GPU; its own
``DotProductAttention`` refuses them. Here torch's ``scaled_dot_product_attention`` runs once for
all documents of one length, so that stock Megatron and helix train on packed rows on CPU ranks. No
mask is larger than a block of queries by the keys of their document.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

_BLOCK = 256  # queries that share a mask
_FULL = ("no_mask", "padding")


class Document(NamedTuple):
    """Where the queries and the keys of one document stand in a packed row.

    Attributes:
        queries: of the rows of query and context.
        keys: of the rows of key and value.
    """

    queries: slice
    keys: slice


def documents(packed: PackedSeqParams) -> list[Document]:
    """The documents of a packed row, empty ones left out.

    ``cu_seqlens_*`` say how long they are, ``cu_seqlens_*_padded``, where given, where they begin.
    """
    queries = _slices(packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
    keys = _slices(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)
    both = zip(queries, keys, strict=True)
    return [Document(q, k) for q, k in both if q.stop > q.start and k.stop > k.start]


def _slices(ends: Any, padded: Any) -> list[slice]:
    used = ends.tolist()
    starts = used if padded is None else padded.tolist()
    lengths = [end - start for start, end in pairwise(used)]
    return [slice(start, start + of) for start, of in zip(starts, lengths, strict=False)]


def _rows(x: torch.Tensor, places: Sequence[slice]) -> Sequence[torch.Tensor]:
    """The rows at each of the places, which ascend.

    By one split, whose gradient is one concatenation; that of a slice is as large as ``x``.
    """
    edges = [0, *(edge for place in places for edge in (place.start, place.stop)), len(x)]
    return x.split([end - start for start, end in pairwise(edges)])[1::2]


class DocumentAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, and the same for packed documents.

    A document's last query stands at its last key, so a document may have more keys than queries:
    causal masks and sliding windows are aligned there. Rows of padding between documents and behind
    them give zeros. Rows that are not packed go to Megatron's.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Query ``[tq, H, d]``, key and value ``[tk, K, d]`` -> ``[tq, H * d]``."""
        if packed_seq_params is None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        assert attention_bias is None, "attention bias of packed documents"
        kind = attn_mask_type or self.attn_mask_type
        window = self.scale_mask_softmax.window_size
        left, right = window or (-1, -1 if kind.name in _FULL else 0)
        several = documents(packed_seq_params)
        queries = _rows(query, [one.queries for one in several])
        keys, values = (_rows(x, [one.keys for one in several]) for x in (key, value))
        alike = defaultdict(list)
        for number, (q, k) in enumerate(zip(queries, keys, strict=True)):
            alike[len(q), len(k)].append(number)
        contexts: dict[int, torch.Tensor] = {}
        for numbers in alike.values():
            q, k, v = (torch.stack([x[one] for one in numbers]) for x in (queries, keys, values))
            together = torch.cat([*self._blocks(q, k, v, left, right)], dim=1)
            contexts |= zip(numbers, together.unbind(), strict=True)
        parts, row = [], 0
        for number, document in enumerate(several):
            parts.append(query.new_zeros(document.queries.start - row, *query.shape[1:]))
            parts.append(contexts[number])
            row = document.queries.stop
        parts.append(query.new_zeros(len(query) - row, *query.shape[1:]))
        return torch.cat(parts).flatten(1).to(value.dtype)

    def _blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, left: int, right: int
    ) -> Iterator[torch.Tensor]:
        """Contexts of documents of one length, from their first queries to their last.

        Query ``[b, queries, H, d]``, key and value ``[b, keys, K, d]`` -> ``[b, block, H, d]``.
        A query at position p sees the keys from ``p - left`` to ``p + right``; negative: all there.
        """
        queries, keys = query.size(1), key.size(1)
        before = keys - queries  # position of the first query
        if left < 0 and (right < 0 or (right == 0 and before == 0)):
            yield self._attend(query, key, value, causal=right == 0)
            return
        for start in range(0, queries, _BLOCK):
            end = min(start + _BLOCK, queries)
            first = 0 if left < 0 else max(before + start - left, 0)
            last = keys if right < 0 else min(before + end + right, keys)
            position = torch.arange(before + start, before + end, device=query.device)[:, None]
            seen = torch.arange(first, last, device=query.device)
            visible = seen >= (position - left if left >= 0 else 0)
            if right >= 0:
                visible = visible & (seen <= position + right)
            part = key[:, first:last], value[:, first:last]
            yield self._attend(query[:, start:end], *part, visible=visible.expand(end - start, -1))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """``[b, queries, H, d]``; all sees all, but what ``causal`` or ``visible`` hides.

        A softmax offset is one more key with a value of zero, in a channel of its own: its score is
        what the query has there. With it stands one more query, so that causal stays causal.
        """
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
        offset, channels = self.softmax_offset, query.size(3)
        if offset is not None:
            wide = torch.promote_types(query.dtype, torch.float32)  # no rounded scores
            query, key, value = (x.to(wide) for x in (query, key, value))
            column = (offset.to(wide) / scale)[:, None].expand(*query.shape[:3], 1)
            query = F.pad(torch.cat([query, column], dim=3), (0, 0, 0, 0, 1, 0))
            sink = F.pad(key.new_ones(len(key), 1, key.size(2), 1), (channels, 0))
            key = torch.cat([sink, F.pad(key, (0, 1))], dim=1)
            value = F.pad(value, (0, 1, 0, 0, 1, 0))
            if visible is not None:
                visible = F.pad(visible, (1, 0, 1, 0), value=True)
        # As Megatron's own does: ranks that have all tokens of some heads draw apart.
        draws = nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with draws:
            context = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                attn_mask=visible,
                dropout_p=self.attention_dropout.p if self.training else 0.0,
                is_causal=causal,
                scale=scale,
                enable_gqa=query.size(2) != key.size(2),
            ).transpose(1, 2)
        return context if offset is None else context[:, 1:, :, :channels]

"""Core attention for the sequence split: every piece of queries attends to its own prefix.

Rank (i, j) holds the queries of some pieces of the sequence (:mod:`megatron_helix.exchange.tokens`
says which) and, gathered over the dim group, the keys and values of the whole sequence. A causal
piece needs only keys up to its own end. A core attention class says how it is called:

* ``takes_runs``: once, with all pieces (``runs``);
* ``aligns_at_end``: once a piece, whose future it hides by the mask's type, aligned to the end of
  the keys, and leaves out what is hidden;
* neither: once a piece by the mask's type, as TransformerEngine does, or with its mask where it is
  derived from Megatron's ``DotProductAttention``; a long piece in several calls
  (:data:`~megatron_helix.exchange.dealing.QUERIES`).

Where TransformerEngine's fused kernels can do it in parts, nothing is gathered before: the rank has
keys and values of its own tokens, and they attend gap by gap (:mod:`megatron_helix.exchange.gaps`).
"""

from functools import cache
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.exchange.decode import attend_to_share, merge_shares
from megatron_helix.exchange.gaps import gaps_of
from megatron_helix.exchange.packed import Share, attend_to_documents, fewer_queries_than_keys
from megatron_helix.exchange.pieces import Piece, pieces
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.tokens import in_calls
from megatron_helix.kernels import engine_attention
from megatron_helix.kernels.gap_attention import attend
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.process_groups import HelixGroups


class _Prefixes(torch.autograd.Function):
    """Forward: ``x[:end]`` for every end, views. Backward: their gradients added up. Saves nothing.

    In fp32, rounded once, as a kernel that sees all queries does; autograd would round each time.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: list[int]) -> tuple[torch.Tensor, ...]:
        ctx.length = x.size(0)
        return tuple(x[:end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        one = grads[0]
        wide = torch.promote_types(one.dtype, torch.float32) if len(grads) > 1 else one.dtype
        total = one.new_zeros((ctx.length, *one.shape[1:]), dtype=wide)
        for grad in grads:
            total[: grad.size(0)] += grad
        return total.to(one.dtype), None


class PrefixPieces(torch.nn.Module):
    """Mixin before a core attention class: piece by piece under a sequence split."""

    plan: Plan
    helix_layout: HelixLayout
    helix_groups: HelixGroups
    config: TransformerConfig

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Query ``[s/m, b, H/n, d]``, key and value ``[s, b, K/n, d]`` -> ``[s/m, b, H/n * d]``."""
        attend_to = super().forward  # the core attention class behind the mixin
        if self.plan.exchange == "partials":
            return self._merged(query, key, value)
        packed = kwargs.get("packed_seq_params")
        if self.plan.split == "sequence" and len(key) < len(query) * self.helix_layout.m:
            return self._by_gaps(query, key, value, packed)
        if isinstance(packed, Share):
            with fewer_queries_than_keys(self):
                return attend_to_documents(
                    attend_to,
                    query,
                    key,
                    value,
                    packed,
                    attn_mask_type,
                    attention_bias=kwargs.get("attention_bias"),
                )
        if self.plan.split != "sequence":
            return attend_to(
                query, key, value, attention_mask, attn_mask_type=attn_mask_type, **kwargs
            )
        layout, segment = self.helix_layout, self.helix_groups.segment
        mine = pieces(layout, segment, key.size(0), balanced=self.plan.balanced)
        if getattr(self, "takes_runs", False):
            if attention_mask is not None:
                attention_mask = torch.cat(
                    [attention_mask[..., piece.start : piece.end, :] for piece in mine], dim=-2
                )
            return attend_to(
                *(query, key, value, attention_mask),
                attn_mask_type=attn_mask_type,
                runs=[tuple(piece) for piece in mine],
                **kwargs,
            )
        causal = attn_mask_type == AttnMaskType.causal
        if causal and not getattr(self, "aligns_at_end", False):
            mine = [part for piece in mine for part in in_calls(piece)]
        ends = [piece.end if causal else key.size(0) for piece in mine]
        parts = zip(
            query.split([piece.length for piece in mine]),
            _Prefixes.apply(key, ends),
            _Prefixes.apply(value, ends),
            mine,
            strict=True,
        )
        contexts = [
            attend_to(
                queries,
                keys,
                values,
                self._rows(attention_mask, piece, len(keys), causal, query.device),
                attn_mask_type=AttnMaskType.causal_bottom_right if causal else attn_mask_type,
                **kwargs,
            )
            for queries, keys, values, piece in parts
        ]
        return torch.cat(contexts)

    def attends_by_gaps(self) -> bool:
        """Whether, under a sequence split, it takes the keys and values of its own tokens alone."""
        sequence = self.plan.split == "sequence" and self.plan.exchange != "partials"
        return sequence and engine_attention.kernel_of(self) is not None

    def _by_gaps(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: Share | None
    ) -> torch.Tensor:
        """Query, key and value of my tokens: ``[s/m, b, ..., d] -> [s/m, b, H/n * d]``."""
        layout, groups = self.helix_layout, self.helix_groups
        kernel = engine_attention.kernel_of(self)
        gaps = share.gaps if share else None
        if gaps is None:
            tokens = len(query) * layout.m
            gaps = gaps_of(self.plan, layout, groups.segment, tokens, query.device)
        assert kernel is not None
        # The next weights are on their way over the dim group, and nothing need wait for them.
        return attend(query, key, value, gaps, kernel, groups.home).flatten(-2)

    def _merged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A decode step on the positions I hold, merged: ``[1, b, H/n, d] -> [1, b, H/n * d/m]``.

        Of a layer with a sliding window they are those in the window.
        """
        layout = self.helix_layout
        scale = self.config.softmax_scale or layout.kv_channels**-0.5
        context, lse = attend_to_share(query, key, value, scale)
        offset = getattr(self, "softmax_offset", None)
        return merge_shares(context, lse, layout, self.helix_groups.dim, offset).to(query.dtype)

    def _rows(
        self,
        mask: torch.Tensor | None,
        piece: Piece,
        end: int,
        causal: bool,
        device: torch.device,
    ) -> torch.Tensor | None:
        """The mask of one piece, ``[b or 1, 1, length, end]``, True where hidden.

        Megatron's local implementation makes masks for square scores only and is given this one.
        """
        if mask is not None:
            return mask[..., piece.start : piece.end, :end]
        local = isinstance(self, DotProductAttention)
        if not causal or not local or getattr(self, "aligns_at_end", False):
            return None
        hidden = torch.ones(piece.length, end, dtype=torch.bool, device=device)
        return hidden.triu(piece.start + 1)[None, None]


@cache
def prefix_pieces(core_attention: type) -> type:
    """The spec's core attention class, able to run a sequence split."""
    return type(f"Helix{core_attention.__name__}", (PrefixPieces, core_attention), {})

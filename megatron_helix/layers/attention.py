"""Self-attention over the m x n partition: Megatron's own, on whole heads of 1/m of the tokens."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.decode import SequenceCache, cached_positions
from megatron_helix.exchange.packed import share_of
from megatron_helix.exchange.pieces import pieces
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.prefix import prefix_pieces
from megatron_helix.exchange.scores import ScoresAttention, SegmentNorm, segment_frequencies
from megatron_helix.exchange.strategy import Choice
from megatron_helix.exchange.tokens import chunk_positions, in_sequence_order
from megatron_helix.kernels import sums
from megatron_helix.kernels.collectives import all_gather, gather
from megatron_helix.layers.linear import helix_linear
from megatron_helix.layers.rotary import document_frequencies, piece_frequencies
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.process_groups import HelixGroups, on_head_axis, register


class HelixSelfAttention(SelfAttention):
    """Megatron's ``SelfAttention`` with the tensor-parallel group cut into head groups x segments.

    The linears span all m * n ranks and store one tile each; the exchange between them and the rest
    hands attention a tensor-parallel group of n ranks and 1/m of the tokens. Rotary embeddings, QK
    norms, output gate, softmax and core attention are stock, on stock shapes. Under ``scores`` they
    work on one segment of the head dimension and all tokens instead.

    Args:
        layout: the partition.
        choice: what the user asked for; ``scores`` decides which core attention is built.
        (others): those of ``SelfAttention``.
    """

    plan = Plan(exchange="activations", split="batch")
    by_gaps = False  # whether core attention is given the keys of my tokens alone

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        layout: HelixLayout,
        choice: Choice = Choice(),
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        assert pg_collection is not None
        groups = register(layout, pg_collection.tp)
        tiles = {"layout": layout, "groups": groups}
        by_scores = choice.exchange == "scores"
        core = partial(ScoresAttention, groups=groups) if by_scores else None
        super().__init__(
            config,
            replace(
                submodules,
                linear_qkv=partial(helix_linear("linear_qkv", submodules.linear_qkv), **tiles),
                linear_proj=partial(helix_linear("linear_proj", submodules.linear_proj), **tiles),
                core_attention=partial(
                    _on_head_axis, core or prefix_pieces(submodules.core_attention), layout.n
                ),
            ),
            layer_number,
            pg_collection=on_head_axis(pg_collection, groups),
            **kwargs,
        )
        self.helix_layout, self.helix_groups = layout, groups
        # Checkpoints read it to tell replicas apart: norms are replicated over all m * n ranks.
        self.tp_group = groups.tp
        if by_scores:
            self._keep_segments(config)
        else:
            self.core_attention.helix_layout = layout
            self.core_attention.helix_groups = groups
        self.helix_modules = [self, self.linear_qkv, self.linear_proj, self.core_attention]
        self.set_plan(Plan(exchange="scores", split="none") if by_scores else self.plan)

    def set_plan(self, plan: Plan) -> None:
        """What moves, and which tokens this rank takes, from the next forward on."""
        for module in self.helix_modules:
            module.plan = plan

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``SelfAttention.forward``; mask and rotary frequencies are those of all tokens."""
        m, segment = self.helix_layout.m, self.helix_groups.segment
        self.by_gaps = self._attends_by_gaps(kwargs)
        if self.plan.documents:
            packed = share_of(
                kwargs["packed_seq_params"],
                self.plan,
                self.helix_layout,
                segment,
                hidden_states.device,
                by_gaps=self.by_gaps,
            )
            kwargs["packed_seq_params"] = packed
            if rotary_pos_emb is not None:
                rotary_pos_emb = document_frequencies(
                    rotary_pos_emb, packed, self.plan, fused=self.config.apply_rope_fusion
                )
            return super().forward(
                hidden_states, None, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        if self.plan.split == "batch":
            if attention_mask is not None and attention_mask.size(0) > 1:
                attention_mask = attention_mask.chunk(m, dim=0)[segment]
        elif rotary_pos_emb is not None and not self._caches_positions(kwargs):
            rotary_pos_emb = self._my_frequencies(rotary_pos_emb)
        return super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Stock, and under a sequence split the keys and values of all tokens.

        ``query [s/m, b, H/n, d]``, ``key`` and ``value`` ``[s, b, K/n, d]``; those of my tokens
        where they attend gap by gap.
        """
        query, key, value, *gate = super().get_query_key_value_tensors(*args, **kwargs)
        if self.plan.exchange == "partials":  # what comes out of core attention is my segment
            channels = self.helix_layout.segment_channels(self.helix_groups.segment)
            gate = [whole[..., channels.to(whole.device)] for whole in gate]
        elif self.plan.split == "sequence" and not self.by_gaps:
            both = all_gather(torch.cat([key, value], dim=-1), self.helix_groups.dim)
            whole = in_sequence_order(both, self.helix_layout, **self.plan.dealing)
            key, value = whole.chunk(2, dim=-1)
            key, value = key.contiguous(), value.contiguous()
        return query, key, value, *gate

    def _attends_by_gaps(self, forward_kwargs: dict[str, Any]) -> bool:
        """Whether this forward hands core attention the keys and values of my tokens alone.

        Not where a cache is filled, nor where core attention is recomputed, which would gather them
        again; and a causal mask needs no other, as TransformerEngine has it.
        """
        if self.plan.split != "sequence":
            return False
        causal = self.attn_mask_type == AttnMaskType.causal or (
            self.plan.documents and self.attn_mask_type == AttnMaskType.padding_causal
        )
        apart = forward_kwargs.get("inference_context") or forward_kwargs.get("attention_bias")
        again = self.checkpoint_core_attention and self.training
        pieces: Any = self.core_attention
        return bool(causal and apart is None and not again and pieces.attends_by_gaps())

    def _caches_positions(self, forward_kwargs: dict[str, Any]) -> bool:
        """Whether this forward fills or reads a cache that is split by position."""
        context = forward_kwargs.get("inference_context")
        return context is not None and self.plan.split == "sequence"

    def _allocate_memory(self, length: int, batch: int, channels: int, dtype: torch.dtype) -> Any:
        """Memory for the keys or values of my sequences: ``[length, batch/m, K/n, channels]``."""
        share = self.helix_layout.m if self.plan.split == "batch" else 1
        return super()._allocate_memory(length, batch // share, channels, dtype)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Stock, and under a sequence split a cache of my positions (`SequenceCache`).

        In the prefill, keys and values of all positions come back; in a step, those I hold. A
        prefill starts at position 0, and a step is one token.
        """
        if not self._caches_positions({"inference_context": inference_context}):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        layout, segment = self.helix_layout, self.helix_groups.segment
        memory, start = (
            inference_context.key_value_memory_dict,
            inference_context.sequence_len_offset,
        )
        if self.plan.exchange != "partials":
            assert start == 0, "a prefill in parts"
            length = key.size(0)
            mine = chunk_positions(layout, segment, length, balanced=self.plan.balanced)
            cache = SequenceCache(
                *(
                    super(HelixSelfAttention, self)._allocate_memory(
                        inference_context.max_sequence_length // layout.m,
                        *part.shape[1::2],
                        part.dtype,
                    )
                    for part in (key, value)
                ),
                positions=cached_positions(
                    layout,
                    segment,
                    prefilled=length,
                    balanced=self.plan.balanced,
                    capacity=inference_context.max_sequence_length,
                ),
            )
            memory[self.layer_number] = cache
            for kept, part in ((cache.key, key), (cache.value, value)):
                kept[: len(mine)] = part[mine.to(part.device)]
            seen, mask_type = torch.arange(length), self.attn_mask_type
        else:
            cache = memory[self.layer_number]
            cache.write(start, key, value)
            held = slice(cache.held(self._oldest_seen(start)), cache.held(start + 1))
            key, value = cache.key[held], cache.value[held]
            mine, seen = torch.tensor([start]), cache.positions[held]
            mask_type = AttnMaskType.no_mask
        if rotary_pos_emb is not None:
            of_query, of_key = rotary_pos_emb
            of_query = of_query[mine.to(of_query.device)]
            of_key = of_key[seen.to(of_key.device)] if len(seen) else None
            rotary_pos_emb = (of_query, of_key)
        return query, key, value, rotary_pos_emb, mask_type, None

    def _oldest_seen(self, position: int) -> int:
        """The first position that a token attends to: not 0 in a layer with a sliding window."""
        window, skip = self.config.window_size, self.config.window_attn_skip_freq
        if not is_layer_window_attention(window, skip, self.layer_number) or window[0] < 0:
            return 0
        return max(0, position - window[0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's; what is cut by head group only is a replica on the other m - 1 ranks."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        offset = state.get(f"{prefix}core_attention.softmax_offset")
        if offset is not None:
            _, _, data_parallel = offset.replica_id
            offset.replica_id = (0, self.helix_groups.segment, data_parallel)
        return state

    def _my_frequencies(self, frequencies: Any) -> Any:
        """(query, key) rotary frequencies: of my queries' positions, or of my channels."""
        query, key = frequencies if isinstance(frequencies, tuple) else (frequencies,) * 2
        segment = self.helix_groups.segment
        if self.plan.exchange == "scores":
            return tuple(segment_frequencies(f, self.helix_layout, segment) for f in (query, key))
        mine = pieces(self.helix_layout, segment, query.size(0), balanced=self.plan.balanced)
        of_mine = piece_frequencies(query, mine)
        return of_mine, of_mine if self.by_gaps else key

    def _keep_segments(self, config: TransformerConfig) -> None:
        """Set the head dimension that stock attention sees to one segment."""
        layout = self.helix_layout
        own = len(layout.segment_channels(self.helix_groups.segment))
        self.hidden_size_per_attention_head = own
        self.key_hidden_size = self.val_hidden_size = own
        for name in ("q_layernorm", "k_layernorm"):
            norm = getattr(self, name)
            # Megatron's local layers of a dense model have none for --qk-l2-norm, either.
            if norm is not None and not isinstance(norm, IdentityOp):
                segment_norm = SegmentNorm(
                    norm,
                    centered=_is_centered(norm),
                    eps=config.layernorm_epsilon,
                    zero_centered_gamma=config.layernorm_zero_centered_gamma,
                    layout=layout,
                    groups=self.helix_groups,
                )
                setattr(self, name, segment_norm)


def _is_centered(norm: torch.nn.Module) -> bool:
    """Whether a norm of queries or keys takes their mean away; by what it is, not by the flags."""
    kind = type(norm).__name__
    if kind in ("LayerNorm", "RMSNorm", "L2Norm"):
        return kind == "LayerNorm"
    raise UserError(
        f"--helix-exchange: scores norms segments of queries and keys, and knows LayerNorm, RMSNorm"
        f" and L2Norm, got {kind} from the layer spec; use --helix-exchange activations"
    )


def _on_head_axis(
    builder: Any, n: int, *, config: TransformerConfig, pg_collection: Any, **kwargs: Any
) -> Any:
    """Core attention for a tensor-parallel size of n: TransformerEngine reads it off config.

    A learnable softmax offset belongs to a head; the m ranks that share the head each see some of
    its gradient, which is summed as soon as it is there.
    """
    config = copy.copy(config)
    config.tensor_model_parallel_size = n
    core = builder(config=config, pg_collection=pg_collection, **kwargs)
    offset = getattr(core, "softmax_offset", None)
    if isinstance(offset, torch.nn.Parameter):
        groups: HelixGroups = pg_collection.helix
        offset.register_hook(partial(_sum_over, group=groups.dim))
        # One of the m replicas counts in the gradient norm.
        offset.tensor_model_parallel = groups.segment == 0  # type: ignore[attr-defined]
    return core


def _sum_over(grad: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of ``[heads]`` over ``group``; of half precision rounded once, not at every hop."""
    return sums.total(gather(grad, group).view(group.size(), *grad.shape))

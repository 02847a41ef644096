"""The transformer layer: plans each micro-batch, keeps the stream in the plan's token order."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.documents import document_ends
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import (
    Choice,
    cache_split,
    decode_plan,
    explain,
    packed_plan,
    prefill_plan,
    resolve,
)
from megatron_helix.exchange.tokens import from_block_order, to_block_order
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.layers.attention import HelixSelfAttention
from megatron_helix.partition.layout import HelixLayout


def block_shape(config: TransformerConfig) -> BlockShape:
    """What the byte model needs of a config. Every layer of a MoE model counts as MoE."""
    return BlockShape(
        hidden=config.hidden_size,
        ffn=0 if config.num_moe_experts else config.ffn_hidden_size,
        gated=config.gated_linear_unit,
        num_layers=config.num_layers,
    )


@dataclass
class BlockEnds:
    """Whether the stream has the block's own token order already, or keeps it, beyond the ends."""

    entered: bool = False
    stays: bool = False


class HelixLayer(torch.nn.Module):
    """Mixin before a ``TransformerLayer`` class.

    Between layers the residual stream has Megatron's shape ``[s/T, b, hidden]``. Under ``weights``
    it is in the block's own token order, which with a batch split is memory of ``[s/n, b/m,
    hidden]``: the first layer of the model converts on entry and the last one on exit (a
    multi-token-prediction layer does both), the others and the pipeline stages between them at most
    view it.
    """

    config: TransformerConfig
    layer_number: int
    is_mtp_layer: bool
    is_moe_layer: bool

    def __init__(
        self,
        *args: Any,
        layout: HelixLayout,
        choice: Choice,
        layer_number: int = 1,  # in its model chunk: Megatron adds the number of those before
        **kwargs: Any,
    ):
        super().__init__(*args, layer_number=layer_number, **kwargs)
        self.helix_layout, self.helix_choice = layout, choice
        self.helix_place = None if self.is_mtp_layer else layer_number
        self.helix_ends = BlockEnds()  # nothing beyond them but what is stock
        self._plans: dict[tuple[int, int, bool], Plan] = {}
        self.helix_modules = [module for module in self.modules() if hasattr(module, "plan")]
        attention = self.self_attention
        assert isinstance(attention, HelixSelfAttention)
        self.helix_groups = attention.helix_groups

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ``TransformerLayer.forward``."""
        packed = kwargs.get("packed_seq_params")
        plan = self._plan(hidden_states, kwargs.get("inference_context"), packed)
        for module in self.helix_modules:
            module.plan = plan  # type: ignore[assignment]
        if not plan.has_own_order:
            return super().forward(hidden_states, *args, **kwargs)
        layout, groups = self.helix_layout, self.helix_groups
        conversion = plan, layout, groups.dim, groups.head_group
        outside = hidden_states.shape
        inside = outside
        if plan.split == "batch":
            inside = (outside[0] * layout.m, outside[1] // layout.m, outside[2])
        if self.is_moe_layer and kwargs.get("padding_mask") is not None:
            raise UserError(
                "padding_mask: must speak of the tokens that an MoE layer has, and under"
                " --helix-exchange weights a rank has others than stock, got one; use"
                " --helix-exchange activations"
            )
        first = self.layer_number == 1 and not self.helix_ends.entered
        if first or self.is_mtp_layer:
            hidden_states = to_block_order(hidden_states, *conversion)
        else:
            hidden_states = hidden_states.view(inside)
        hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        last = self.layer_number == self.config.num_layers and not self.helix_ends.stays
        if last or self.is_mtp_layer:
            hidden_states = from_block_order(hidden_states, *conversion)
        else:
            hidden_states = hidden_states.view(outside)
        # Pipeline schedules free the memory of what a stage sent, and refuse to for a view.
        keep = {"requires_grad": hidden_states.requires_grad, "keep_graph": True}
        return make_viewless_tensor(inp=hidden_states, **keep), context

    def _plan(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any,
        packed: PackedSeqParams | None,
    ) -> Plan:
        """The plan for this micro-batch's shape and documents: equal on every rank."""
        rows, batch, _ = hidden_states.shape
        sequence = rows * self.helix_layout.size if self.config.sequence_parallel else rows
        if inference_context is None:
            return self.plan_for(sequence, batch, packed)
        if packed is not None:
            raise UserError(
                "packed_seq_params: are of training under --helix-m > 1, got them beside an"
                " inference_context; leave one of the two away"
            )
        if inference_context.sequence_len_offset:
            return decode_plan(cache_split(self.helix_choice, self.helix_layout, batch))
        return prefill_plan(
            self.helix_choice,
            self.helix_layout,
            block_shape(self.config),
            sequence=sequence,
            batch=batch,
            sequence_parallel=self.config.sequence_parallel,
        )

    def plan_for(self, sequence: int, batch: int, packed: PackedSeqParams | None = None) -> Plan:
        """The plan for micro-batches of ``batch`` sequences of ``sequence`` tokens.

        Packed, they are one row of documents.
        """
        if packed is not None:
            if batch > 1:
                raise UserError(
                    "packed_seq_params: a micro-batch of packed rows must be flattened into one,"
                    f" got {batch} of {sequence} tokens; lay them one behind the other, and their"
                    " cu_seqlens"
                )
            documents = document_ends(packed, sequence)
            return replace(self._plan_of(sequence, 1, True), documents=documents)
        return self._plan_of(sequence, batch, False)

    def _plan_of(self, sequence: int, batch: int, packed: bool) -> Plan:
        """The plan for micro-batches of a shape."""
        shape = sequence, batch, packed
        if shape not in self._plans:
            known = (self.helix_choice, self.helix_layout, block_shape(self.config))
            size = {"sequence": sequence, "batch": batch}
            parallel = {"sequence_parallel": self.config.sequence_parallel}
            if packed:
                plan = packed_plan(*known, tokens=sequence, **parallel)
            else:
                plan = resolve(*known, **size, **parallel)
            self._plans[shape] = self.helix_choice.of_layer(plan, self.helix_place)
            if self.layer_number == 1 and torch.distributed.get_rank() == 0:
                print(explain(plan, *known, **size), flush=True)
        return self._plans[shape]


@cache
def helix_layer(layer: type) -> type:
    """The spec's transformer layer class, planning every micro-batch."""
    return type(f"Helix{layer.__name__}", (HelixLayer, layer), {})

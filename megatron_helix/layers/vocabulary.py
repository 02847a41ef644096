"""Embedding and LM head beside a decoder block that keeps its own token order.

Stock, both span all T ranks: the embedding reduce-scatters the stream, the head gathers it. Where
the plan is ``weights`` and the micro-batch has more tokens than a head group has vocabulary, they
do as the linears of the block do: each rank works on its own tokens with the vocabulary of its head
group, whose m shards are gathered, and kept for a step where those of all layers are. The stream
then enters and leaves the block in the block's own order; what is gathered in the end are the
losses. With fewer tokens and a sequence split they stay stock and are given word ids and labels in
the order of the block; the losses are put back in order, and nothing moves for it. With a batch
split the block converts the stream at its ends.

Sharded einsums (V vocabulary, N tokens, D hidden)::

    stream[N_mn, D]  = onehot[N_m, V_n] E[V_n, D]     E: all-gather dim; reduce-scatter head
    logits[N_m, V_n] = stream[N_mn, D] E[V_n, D]^T    a column linear under ``weights``
    losses[N]        = cross entropy over head of logits, all-gathered over dim

Elements a rank sends, forward and backward, with ``c = N D / T``: embedding ``2 (T-1) c`` in stock,
``2 (n-1) c + 2 (m-1) V D / T`` here; head ``3 (T-1) c`` in stock, ``3 (n-1) c + 3 (m-1) V D / T``
here. As ``T - n = n (m-1)``, this sends less if ``N > V / n``.

The classes extend the modules of a built model in place, as torch's ``fully_shard`` does: Megatron
builds them without a seam in its specs, and they hold the same parameters either way.
"""

import copy
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.config_logger import has_config_logger_enabled
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_helix.exchange.gathered_weight import GatheredWeight, whole
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.tokens import (
    Order,
    by_segment,
    in_order,
    in_sequence_order,
    out_of_order,
    stream_order,
)
from megatron_helix.exchange.weights import column_linear
from megatron_helix.kernels.collectives import gather, reduce_scatter
from megatron_helix.layers.transformer_layer import BlockEnds, HelixLayer
from megatron_helix.layers.weight_forms import WeightForms
from megatron_helix.partition.process_groups import HelixGroups, on_head_axis

_FORWARD = inspect.signature(GPTModel.forward)
_INFERRING = {"inference_context", "inference_params"}
_TAKES_LOGITS = {"runtime_gather_output", "output_processor"}


@dataclass(kw_only=True)
class _Vocabulary:
    """What embedding, head and model of one pipeline stage share."""

    groups: HelixGroups
    ends: BlockEnds
    layer: HelixLayer  # the last one: it keeps what it gathers where all do
    size: int
    packed: PackedSeqParams | None = None  # the documents of this micro-batch

    def moves(self, sequence: int, batch: int) -> bool:
        """Whether micro-batches of this shape keep the block's order beyond its ends."""
        plan = self.plan(sequence, batch)
        return plan.has_own_order and (plan.split == "sequence" or self.gathers(sequence, batch))

    def gathers(self, sequence: int, batch: int) -> bool:
        """Whether a rank embeds and predicts its own tokens: that sends fewer bytes."""
        return sequence * batch > self.size // self.groups.head.size()

    def mine(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of ``[b, s]`` what my head-axis group works on: ``[b/m, s]``, or dealt ``[b, s/m]``."""
        plan, segment = self.plan(*tokens.shape[::-1]), self.groups.segment
        if plan.split == "batch":
            return tokens.chunk(self.groups.dim.size())[segment]
        return by_segment(tokens.t(), self.layer.helix_layout, **plan.dealing)[segment].t()

    def every(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses of what is :meth:`mine` -> of all ``[b, s]`` labels, all-gathered over dim."""
        plan = self.plan(*labels.shape[::-1])
        if plan.split == "batch":
            return _AllLosses.apply(losses, self.groups.dim)
        gathered = _AllLosses.apply(losses.t().contiguous(), self.groups.dim)
        whole = in_sequence_order(gathered, self.layer.helix_layout, **plan.dealing)
        return whole.t().contiguous()

    def order(self, tokens: torch.Tensor) -> Order | None:
        """Of ``[b, s]`` tokens into the dealt stream; None with a batch split."""
        batch, sequence = tokens.shape
        plan = self.plan(sequence, batch)
        if plan.split != "sequence":
            return None
        return stream_order(self.layer.helix_layout, sequence, tokens.device, plan.documents)

    def plan(self, sequence: int, batch: int) -> Plan:
        """Of micro-batches of this shape."""
        return self.layer.plan_for(sequence, batch, self.packed)


def extend(model: list[Any]) -> list[Any]:
    """Extend embedding and head of the built ``model``; one of its config's ``pre_wrap_hooks``."""
    for chunk in model:
        if not isinstance(chunk, GPTModel):
            raise TypeError(f"need a GPTModel to extend its vocabulary, got {type(chunk).__name__}")
        layers = [layer for layer in chunk.decoder.layers if isinstance(layer, HelixLayer)]
        if not layers or chunk.config.mtp_num_layers:
            continue
        vocabulary = _Vocabulary(
            groups=layers[0].helix_groups,
            ends=BlockEnds(),
            layer=layers[-1],
            size=chunk.vocab_size,
        )
        for layer in layers:
            layer.helix_ends = vocabulary.ends
        modules: list[tuple[Any, type]] = [(chunk, _Model)]
        if chunk.pre_process:
            modules.append((chunk.embedding.word_embeddings, _Embedding))
        if chunk.post_process:
            modules.append((chunk.output_layer, _Head))
        for module, mixin in modules:
            module.helix_vocabulary = vocabulary
            module.__class__ = _extended(mixin, type(module))
    return model


def _watched(*modules: torch.nn.Module) -> bool:
    """Whether a hook sees what one of the modules gives, or its gradient."""
    return any(module._forward_hooks or module._backward_hooks for module in modules)


@cache
def _extended(mixin: type, module: type) -> type:
    return type(f"Helix{module.__name__}", (mixin, module), {})


class _Model(torch.nn.Module):
    """Mixin before ``GPTModel``: tells the block's ends what stands beyond them.

    What looks into the stream from outside gets stock's: whoever brings or takes hidden states or
    logits, and a hook.
    """

    config: Any
    helix_vocabulary: _Vocabulary
    pre_process: bool
    post_process: bool
    embedding: Any
    decoder: torch.nn.Module
    output_layer: torch.nn.Module
    pg_collection: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``GPTModel.forward``. Without labels it is asked for all logits: the stock head."""
        given = _FORWARD.bind(self, *args, **kwargs).arguments
        asked = {name for name, value in given.items() if value is not None}
        ends = self.helix_vocabulary.ends
        self.helix_vocabulary.packed = given.get("packed_seq_params")
        # While inferring the plan is another one.
        stock = (
            asked & _INFERRING or has_config_logger_enabled(self.config) or _watched(self.decoder)
        )
        ends.entered = not stock and self._embeds_in_block_order(given, asked)
        ends.stays = not stock and self._predicts_in_block_order(given, asked)
        return super().forward(*args, **kwargs)

    def _embeds_in_block_order(self, given: dict[str, Any], asked: set[str]) -> bool:
        if not self.pre_process or "input_ids" not in asked or "decoder_input" in asked:
            return False
        words = self.embedding.word_embeddings
        if not words.reduce_scatter_embeddings or _watched(self.embedding, words):
            return False
        return self.helix_vocabulary.moves(*given["input_ids"].shape[::-1])

    def _predicts_in_block_order(self, given: dict[str, Any], asked: set[str]) -> bool:
        if not self.post_process or "labels" not in asked or asked & _TAKES_LOGITS:
            return False
        if _watched(self.output_layer):
            return False
        return self.helix_vocabulary.moves(*given["labels"].shape[::-1])

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Labels ``[b, s]``, logits of all or of my sequences -> losses ``[b, s]``."""
        if not self.helix_vocabulary.ends.stays:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[misc]
        vocabulary = self.helix_vocabulary
        order = vocabulary.order(labels)
        if order and not vocabulary.gathers(*labels.shape[::-1]):
            dealt = in_order(labels, order, dim=1)
            losses = super().compute_language_model_loss(dealt, logits)  # type: ignore[misc]
            return out_of_order(losses, order, dim=1)
        on_head: Any = copy.copy(self)  # stock cross entropy, over the ranks of my tokens
        on_head.tp_group = vocabulary.groups.head
        on_head.pg_collection = on_head_axis(self.pg_collection, vocabulary.groups)
        mine = vocabulary.mine(labels)
        losses = super(_Model, on_head).compute_language_model_loss(mine, logits)  # type: ignore[misc]
        return vocabulary.every(losses, labels)


class _Table(torch.nn.Module):
    """Mixin of both ends: the vocabulary of a head group, from the shards of a dim group."""

    helix_vocabulary: _Vocabulary
    forms: WeightForms | None = None

    def table(self, shard: torch.nn.Parameter, sequence: int, batch: int) -> GatheredWeight:
        """``[V/n, D]``, for micro-batches of this shape."""
        vocabulary = self.helix_vocabulary
        if self.forms is None:
            groups = vocabulary.groups.dim, vocabulary.groups.home
            self.forms = WeightForms(shard, Shards(axis=0), *groups, engine=False)
        self.forms.keep(vocabulary.plan(sequence, batch), training=self.training)
        return self.forms.either_way()


class _Embedding(_Table):
    """Mixin before ``VocabParallelEmbedding``."""

    deterministic_mode: bool
    weight: torch.nn.Parameter

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[b, s] -> [s/T, b, D]``; with a batch split it is memory of ``[s/n, b/m, D]``."""
        vocabulary, groups = self.helix_vocabulary, self.helix_vocabulary.groups
        if not vocabulary.ends.entered:
            return super().forward(tokens)
        b, s = tokens.shape
        order = vocabulary.order(tokens)
        if order and not vocabulary.gathers(s, b):
            return super().forward(in_order(tokens, order, dim=1))
        table = whole(self.table(self.weight, s, b))
        mine = vocabulary.mine(tokens) - groups.head_group * table.size(0)
        outside = (mine < 0) | (mine >= table.size(0))
        inside = mine.masked_fill(outside, 0)
        # As stock: the gradient of F.embedding is summed in no order of its own on a GPU.
        rows = table[inside] if self.deterministic_mode else F.embedding(inside, table)
        rows = rows.masked_fill(outside[..., None], 0.0).transpose(0, 1)  # [s, b/m, D]
        stream = reduce_scatter(rows, groups.head)  # [s/n, b/m, D]
        return stream.view(s // groups.tp.size(), b, -1)


class _Head(_Table):
    """Mixin before the ``ColumnParallelLinear`` of the LM head."""

    weight: torch.nn.Parameter | None

    def forward(
        self, stream: torch.Tensor, weight: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """``[s/T, b, D]``, in the block's order -> ``[s, b/m, V/n]`` or ``[s/m, b, V/n]``."""
        vocabulary, groups = self.helix_vocabulary, self.helix_vocabulary.groups
        rows, b, width = stream.shape
        shape = rows * groups.tp.size(), b
        if not vocabulary.ends.stays or not vocabulary.gathers(*shape):
            return super().forward(stream, weight=weight, **kwargs)
        if vocabulary.plan(*shape).split == "batch":
            m = groups.dim.size()
            stream = stream.view(rows * m, b // m, width)
        shard: Any = self.weight if weight is None else weight
        return column_linear(stream, self.table(shard, *shape), groups.head), None


class _AllLosses(torch.autograd.Function):
    """Forward: all-gather over dim. Backward: my part. Saves nothing.

    Every rank of a tensor-parallel group computes the same from all losses and gets the same
    gradient back, so there is nothing to sum.
    """

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor, dim: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim = dim
        return gather(losses, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.dim.size())[ctx.dim.rank()], None

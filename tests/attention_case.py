"""One attention layer, cut and whole: the same global weights, input and mask in both.

Double precision, so that roundoff is far below any mistake in what is computed from what.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module

from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.layer_spec import (
    helixify,
    with_core_attention,
    with_sequence_parallel_norms,
)
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.tiles import stored
from megatron_helix.upstream import patches
from tests.cpu_config import cpu_config
from tests.distributed import model_parallel

HIDDEN, KV_CHANNELS = 32, 8

# Dimension along which each weight is cut, and the canonical order it is stored in.
TILED = {
    "linear_qkv.weight": (0, HelixLayout.qkv_rows),
    "linear_qkv.bias": (0, HelixLayout.qkv_rows),
    "linear_proj.weight": (1, HelixLayout.proj_columns),
}
OFFSET = "core_attention.softmax_offset"  # learnable; one number a head


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How ranks share attention: four of them, or others with a sequence that they divide."""

    m: int
    n: int
    exchange: str = "activations"
    split: str = "batch"
    sequence_parallel: bool = False
    core: str = "spec"
    sequence: int = 8
    batch: int = 4

    @property
    def ranks(self) -> int:
        """How many."""
        return self.m * self.n


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which attention is shared."""

    heads: int = 4
    groups: int = 4
    rope: bool = True
    bias: bool = False
    mask: str = "causal"  # "given": another one for each sequence; "padding": not causal
    more: dict[str, Any] = field(default_factory=dict)  # of TransformerConfig


Weights = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Result:
    """Output, and gradients of the input and of every weight, by name."""

    output: torch.Tensor
    input_grad: torch.Tensor
    weight_grads: dict[str, torch.Tensor]
    summed_over_ranks: set[
        str
    ]  # weights whose gradient Megatron sums over the tensor-parallel group


def layout_of(cut: Cut, model: Model) -> HelixLayout:
    """The partition of this model."""
    return HelixLayout(
        m=cut.m,
        n=cut.n,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=KV_CHANNELS,
        rotary_dim=KV_CHANNELS if model.rope else 0,
        output_gate=model.more.get("attention_output_gate", False),
    )


def stream_part(cut: Cut, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """A rank's part of the residual stream ``[s, b, hidden]``, as attention gets and gives it."""
    if not cut.sequence_parallel:
        return whole
    i, j = divmod(rank, cut.m)
    if (cut.exchange, cut.split) == ("weights", "sequence") and cut.m > 1:
        chunk = whole.chunk(cut.n)[i].chunk(2 * cut.m)
        return torch.cat([chunk[j], chunk[-1 - j]])
    if (cut.exchange, cut.split) == ("weights", "batch"):
        return whole.chunk(cut.n)[i].chunk(cut.m, dim=1)[j]
    return whole.chunk(cut.m * cut.n)[rank]


def weight_part(layout: HelixLayout, rank: int, name: str, whole: torch.Tensor) -> torch.Tensor:
    """A rank's part of a weight."""
    if name in TILED:
        axis, order = TILED[name]
        return stored(whole, order(layout).chunk(layout.size)[rank], axis)
    if name == OFFSET:
        return whole.chunk(layout.n)[layout.coordinates(rank)[0]]
    return whole


def whole(models: dict[str, Model], sequence: int, batch: int) -> dict[str, tuple[Weights, Result]]:
    """Stock attention: random weights, and what comes of them. Runs in one rank."""
    results = {}
    with model_parallel():
        alone = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
        for name, model in models.items():
            attention = _build(model, None, alone)
            weights = {
                key: _random(sum(map(ord, key)), *weight.shape) / HIDDEN**0.5
                for key, weight in attention.named_parameters()
            }
            attention.load_state_dict(weights, strict=False)  # Megatron's extra states are left
            stream = _stream(sequence, batch)
            results[name] = weights, _step(attention, model, sequence, batch, stream)
    return results


def parts(models: dict[str, Model], cut: Cut, weights: dict[str, Weights]) -> dict[str, Result]:
    """This rank's part of the same. Runs in the ranks of the cut."""
    results = {}
    patches.relax_head_check()
    with model_parallel(tp=cut.ranks):
        rank = dist.get_rank()
        all_of_them = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
        for name, model in models.items():
            attention, layout = _build(model, cut, all_of_them), layout_of(cut, model)
            mine = dict(attention.named_parameters())
            assert mine.keys() == weights[name].keys()
            with torch.no_grad():
                for key, weight in weights[name].items():
                    mine[key].copy_(weight_part(layout, rank, key, weight))
            stream = [stream_part(cut, rank, t) for t in _stream(cut.sequence, cut.batch)]
            results[name] = _step(attention, model, cut.sequence, cut.batch, stream)
            parallel_state.get_global_memory_buffer().buffer.clear()
    return results


def counts_offset(model: Model, cut: Cut) -> bool:
    """Whether Megatron counts this rank's softmax offset in the gradient norm."""
    with model_parallel(tp=4):
        four = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
        offset = dict(_build(model, cut, four).named_parameters())[OFFSET]
        return param_is_not_tensor_parallel_duplicate(offset, four.tp)


def _build(model: Model, cut: Cut | None, groups: ProcessGroupCollection) -> torch.nn.Module:
    """The attention of Megatron's local layer spec, cut or whole."""
    config = cpu_config(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=KV_CHANNELS,
        add_bias_linear=model.bias,
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=bool(cut and cut.sequence_parallel),
        params_dtype=torch.float64,
        **model.more,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    if cut:
        choice = Choice(exchange=cut.exchange, split=cut.split)
        spec = with_core_attention(spec, cut.core)
        cut_spec = helixify(spec, layout_of(cut, model), choice)
        assert (cut_spec is spec) == (cut.m == 1)  # one segment is plain tensor parallelism
        spec = with_sequence_parallel_norms(cut_spec, config)
    layer = spec.layer_specs[0] if config.sequence_parallel else spec
    attention = layer.submodules.self_attention
    mask_type = AttnMaskType.padding if model.mask == "padding" else AttnMaskType.causal
    params = {**attention.params, "attn_mask_type": mask_type}
    attention = dataclasses.replace(attention, params=params)
    module = build_module(attention, config=config, layer_number=1, pg_collection=groups)
    if cut and cut.m > 1 and cut.exchange != "scores":
        module.set_plan(Plan(exchange=cut.exchange, split=cut.split))
    return module.double()  # norms take no dtype from the config


def _stream(sequence: int, batch: int) -> list[torch.Tensor]:
    """Input, and gradient of the output."""
    return [_random(seed, sequence, batch, HIDDEN) for seed in (1, 2)]


def _step(
    attention: torch.nn.Module, model: Model, s: int, b: int, stream: list[torch.Tensor]
) -> Result:
    """With a rank's part of the stream ``[s, b, hidden]``, or with all of it."""
    x, y_grad = stream
    x = x.clone().requires_grad_()
    rotary = (
        RotaryEmbedding(KV_CHANNELS, 1.0, use_cpu_initialization=True)(s) if model.rope else None
    )
    output, bias = attention(x, _mask(model.mask, s, b), rotary_pos_emb=rotary)
    output = output if bias is None else output + bias
    custom_backward((output * y_grad).sum(), None)  # as Megatron's schedules call it
    weights = dict(attention.named_parameters())
    return Result(
        output=output.detach(),
        input_grad=x.grad,
        weight_grads={name: weight.grad for name, weight in weights.items()},
        summed_over_ranks={
            name
            for name, weight in weights.items()
            # The rule of megatron.core.distributed.finalize_model_grads.
            if getattr(weight, "sequence_parallel", False) or "_layernorm" in name
        },
    )


def _mask(kind: str, s: int, b: int) -> torch.Tensor | None:
    """``[b, 1, s, s]``, true where attention may not look; if none, Megatron makes one."""
    if kind == "causal":
        return None
    hidden = _random(3, b, 1, s, s) > 0.5
    if kind == "given":
        hidden |= torch.ones(s, s, dtype=torch.bool).triu(1)
    return hidden & ~torch.eye(s, dtype=torch.bool)  # a token always sees itself


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

"""Small models that say something, their layouts, and what one rank sees of prefill and decode."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_helix.exchange.strategy import Choice
from megatron_helix.inference.engine import Engine, cache_bytes, micro_batches
from megatron_helix.inference.sampling import Sampling
from megatron_helix.layers import vocabulary
from megatron_helix.layers.layer_spec import (
    helixify,
    with_core_attention,
    with_sequence_parallel_norms,
)
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.recording.comm_ledger import CommLedger, install
from megatron_helix.upstream import patches
from tests.cpu_config import cpu_config
from tests.distributed import model_parallel

VOCABULARY, FFN, NEW_TOKENS, POSITIONS = 192, 240, 6, 64
BATCHES = (1, 3, 8)
AXES = {"TENSOR_MODEL_PARALLEL_GROUP": "tp", "HELIX_DIM_GROUP": "dim"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Heads, and what else there is of attention."""

    heads: int = 4
    groups: int = 4
    channels: int = 16
    position: str = "rope"
    more: dict[str, Any] = field(default_factory=dict)  # of TransformerConfig


MODELS = {
    "mha": Model(),
    "gqa": Model(groups=2),
    "mqa": Model(groups=1),
    "gqa_16_2": Model(heads=16, groups=2),
    "gated": Model(more={"attention_output_gate": True, "qk_layernorm": True}),
    "sink": Model(position="learned_absolute", more={"softmax_type": "learnable"}),
    "off_by_one": Model(groups=2, more={"softmax_type": "off-by-one"}),
    # One layer with a window that is shorter than the prompts, and one without.
    "window": Model(groups=2, more={"window_size": (3, 0), "window_attn_skip_freq": 2}),
    "moe": Model(
        more={
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 96,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks share the model; stock without m and n."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    m: int = 0
    n: int = 0
    exchange: str = "auto"
    split: str = "auto"
    sequence_parallel: bool = False
    microbatches: int = 1
    core: str = "spec"
    batches: tuple[int, ...] = BATCHES

    def partition(self, model: Model) -> HelixLayout:
        return HelixLayout(
            m=self.m or 1,
            n=self.n or self.tp,
            num_attention_heads=model.heads,
            num_query_groups=model.groups,
            kv_channels=model.channels,
            rotary_dim=model.channels if model.position == "rope" else 0,
            output_gate="attention_output_gate" in model.more,
        )


def helix(m: int, n: int, **how: Any) -> Layout:
    """A helix layout."""
    return Layout(tp=m * n, m=m, n=n, **how)


@dataclass(kw_only=True)
class Result:
    """What one rank saw of one batch."""

    tokens: torch.Tensor  # [b, total]
    logits: list[torch.Tensor | None]
    cache_bytes: int
    step_bytes: list[dict[tuple[str, str], int]]  # of each decode step
    kept_bytes: list[dict[tuple[str, str], int]]  # the same


def prompts(batch: int) -> list[list[int]]:
    """Prompts of unequal length, the shortest not a multiple of any number of ranks."""
    generator = torch.Generator().manual_seed(batch)
    lengths = [5 + 7 * i % 4 for i in range(batch)]
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def _draw(weight: torch.Tensor) -> torch.Tensor:
    """A weight by its whole shape alone: the same whatever was drawn before it on this rank.

    Large enough for tokens to depend on all that stands before them. Offsets are set below.
    """
    if weight.dim() == 1:
        return weight
    generator = torch.Generator().manual_seed(1000 * weight.size(0) + weight.size(1))
    return torch.nn.init.normal_(weight, std=0.2, generator=generator)


def _draw_embedding(weight: torch.Tensor) -> torch.Tensor:
    """Not that of the LM head, which has the same shape."""
    return torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))


def _build(model: Model, layout: Layout) -> GPTModel:
    """This rank's part of a model; the whole is the same for every layout."""
    config = cpu_config(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=FFN,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.channels,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        pipeline_dtype=torch.float32,
        sequence_parallel=layout.sequence_parallel,
        add_bias_linear=False,
        init_method=_draw,
        output_layer_init_method=_draw,
        embedding_init_method=_draw_embedding,
        **model.more,
    )
    spec: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    spec = with_core_attention(spec, layout.core)
    if layout.m:
        choice = Choice(exchange=layout.exchange, split=layout.split)
        spec = helixify(spec, layout.partition(model), choice)
    spec = with_sequence_parallel_norms(spec, config)
    gpt = GPTModel(
        config,
        spec,
        VOCABULARY,
        POSITIONS,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=model.position,
    )
    for name, offset in gpt.named_parameters():
        if name.endswith("softmax_offset"):  # a head's number, whichever rank has it
            heads = offset.numel()
            first = parallel_state.get_tensor_model_parallel_rank() // (layout.m or 1) * heads
            offset.data = torch.arange(first, first + heads, dtype=torch.float32) - 1
    if layout.m > 1:
        vocabulary.extend([gpt])
    return gpt


def generate(model: Model, layout: Layout, batches: tuple[int, ...]) -> list[Result]:
    """Greedy tokens for each batch, on this rank."""
    results = []
    if layout.m > 1:
        patches.relax_head_check()
    with model_parallel(tp=layout.tp, pp=layout.pp, ep=layout.ep):
        gpt = _build(model, layout)
        engine = Engine(gpt, Sampling().sampler(torch.device("cpu"), VOCABULARY))
        for batch in batches:
            parts = micro_batches(prompts(batch), NEW_TOKENS, count=layout.microbatches, size=48)
            steps = list(engine.prefill(parts))
            ledger = CommLedger()
            uninstall = install(ledger)
            sent, kept = [], []
            for step in engine.decode(parts):
                steps.append(step)
                taken = ledger.take().items()
                sent.append({(AXES.get(a, a), kind): t.sent_bytes for (a, kind), t in taken})
                kept.append({(AXES.get(a, a), kind): t.kept_bytes for (a, kind), t in taken})
            uninstall()
            results.append(
                Result(
                    tokens=torch.cat([part.tokens for part in parts]),
                    logits=[step.logits for step in steps],
                    cache_bytes=cache_bytes(parts),
                    step_bytes=sent,
                    kept_bytes=kept,
                )
            )
    return results

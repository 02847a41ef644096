"""Floating-point operations and memory traffic of one rank, for one micro-batch, forward.

A matrix product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` operations. Stock and helix alike, a
rank of T does 1/T of each. A backward pass is two forward passes, in operations and in memory
traffic.
Source of the terms: Narayanan et al., "Efficient large-scale language model training on GPU
clusters using Megatron-LM" (2021), appendix; Chowdhery et al., "PaLM" (2022), appendix B.
"""

from dataclasses import dataclass

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config import ModelConfig

FORMULA = (
    "FLOPs of a token, forward: layers x (2 D (2 H + 2 K) d + 4 s H d + 2 (2, gated 3) D F x"
    " active experts + 2 D E) + 2 D V; training is three times that"
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank computes in one part of a micro-batch.

    Attributes:
        what: for a reader.
        flops: operations of matrix products.
        memory_bytes: read from and written to device memory.
    """

    what: str
    flops: float
    memory_bytes: float


def forward(here: Deployment, stage: int, *, fused_channels: int, element_bytes: int) -> list[Work]:
    """The parts of one micro-batch on a rank of ``stage``, forward pass.

    Args:
        here: the deployment.
        stage: pipeline stage.
        fused_channels: largest head dimension with fused attention.
        element_bytes: of weights and activations.
    """
    model, T = here.model, here.tp
    N, D = here.tokens, model.hidden_size
    layers = here.layers
    features = (3 if model.swiglu else 2) * model.ffn_hidden_size
    experts = model.num_experts
    # Weights are read once; under `weights` a rank multiplies with those of its whole head group.
    gathered = here.cut.m if here.plan.exchange == "weights" else here.layout.gtp
    projections = packed(here.cut) * D
    parts = [
        Work(
            what="attention linears",
            flops=layers * 2 * N * projections / T,
            memory_bytes=layers
            * element_bytes
            * (projections * gathered + N * (packed(here.cut) + 2 * D))
            / T,
        )
    ]
    parts.append(_attention(here, fused_channels, element_bytes))
    own = N / (here.stream_ranks if experts else T)
    rows = own * (model.moe_router_topk if experts else 1)
    held = (
        features * D * (gathered / T if not experts else experts / here.layout.ep / here.layout.etp)
    )
    parts.append(
        Work(
            what="experts" if experts else "MLP",
            flops=layers * 2 * (rows * features * D + own * D * (experts or 0)),
            memory_bytes=layers * element_bytes * (held + rows * (features + 2 * D)),
        )
    )
    # Two norms and two residual additions read and write the stream, the activation its features.
    streamed = 10 * N * D / T + rows * features
    parts.append(
        Work(what="norms, residuals", flops=0, memory_bytes=layers * element_bytes * streamed)
    )
    if stage == here.stages - 1:
        words = N if here.phase == "train" else here.layout.micro_batch
        vocabulary = here.vocabulary / T
        moved = vocabulary * D * element_bytes + words * vocabulary * (element_bytes + 4)
        parts.append(Work(what="LM head", flops=2 * words * vocabulary * D, memory_bytes=moved))
    return parts


def _attention(here: Deployment, fused_channels: int, element_bytes: int) -> Work:
    """Scores and their use: causal where fused, the whole square where not."""
    model, T = here.model, here.tp
    channels = model.num_attention_heads * model.kv_channels
    keys = here.batch.sequence_length
    pairs = here.tokens * keys
    cache = 2 * model.query_groups * model.kv_channels * keys * here.layout.micro_batch
    moved = element_bytes * (4 * here.tokens * channels + cache) / T
    fused = model.kv_channels <= fused_channels and here.plan.exchange != "scores"
    causal = 0.5 if fused and here.phase != "decode" else 1.0
    if not fused:  # scores written, read for the softmax, its result written, and read
        moved += 4 * element_bytes * pairs * model.num_attention_heads / T
    return Work(
        what="attention" if fused else "attention, unfused",
        flops=here.layers * 4 * pairs * channels * causal / T,
        memory_bytes=here.layers * moved,
    )


def useful(here: Deployment) -> float:
    """Operations of a step of the whole model, attention causal: what no layout can avoid."""
    words = here.step_tokens if here.phase == "train" else here.batch.sequences
    keys = here.batch.sequence_length * (1 if here.phase == "decode" else 0.5)
    passes = 3 if here.phase == "train" else 1
    return passes * of_model(here.model, tokens=here.step_tokens, words=words, keys=keys)


def of_model(
    model: ModelConfig, *, tokens: float, words: float, keys: float, vocabulary: int | None = None
) -> float:
    """Operations of a forward pass of the whole model, by :data:`FORMULA`.

    Args:
        model: the model.
        tokens: that go through the layers.
        words: that go through the LM head.
        keys: that a token attends to; s, or half of it where attention is causal.
        vocabulary: V; the model's by default.
    """
    D, d, F = model.hidden_size, model.kv_channels, model.ffn_hidden_size
    H, K = model.num_attention_heads, model.query_groups
    E = model.num_experts or 0
    mlp = 2 * (3 if model.swiglu else 2) * D * F * (model.moe_router_topk if E else 1) + 2 * D * E
    layer = 2 * D * (2 * H + 2 * K) * d + 4 * keys * H * d + mlp
    head = 2 * D * (vocabulary or model.vocab_size)
    return tokens * model.num_layers * layer + words * head

"""Floating-point operations and memory traffic of one rank, for one micro-batch, forward.

A matrix product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` operations. Stock and helix alike, a
rank of T does 1/T of each. A backward pass is two forward passes in operations, and in memory
traffic where it is not counted apart; what training moves beside the layers is in
:mod:`megatron_helix.planner.update`.
Source of the terms: Narayanan et al., "Efficient large-scale language model training on GPU
clusters using Megatron-LM" (2021), appendix; Chowdhery et al., "PaLM" (2022), appendix B. Memory
traffic is counted from the kernels that Megatron and its TransformerEngine layers start: a tensor
that one writes and the next reads goes through memory twice.
"""

from dataclasses import dataclass

from megatron_helix.exchange.traffic import put_in_order
from megatron_helix.planner import core_attention
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.model import ModelConfig

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
        backward_bytes: the same of the backward pass; None is twice as much.
        fused: whether it is a fused attention kernel.
    """

    what: str
    flops: float = 0.0
    memory_bytes: float = 0.0
    backward_bytes: float | None = None
    fused: bool = False

    @property
    def streams(self) -> bool:
        """Whether its kernels are bound by memory; those of products move what they multiply."""
        return not self.flops

    def moved(self, *, forward: float, backward: float) -> float:
        """Bytes of so many passes."""
        back = 2 * self.memory_bytes if self.backward_bytes is None else self.backward_bytes
        return forward * self.memory_bytes + backward * back


def forward(here: Deployment, stage: int, *, fused_channels: int) -> list[Work]:
    """The parts of one micro-batch on a rank of ``stage``, forward pass.

    Args:
        here: the deployment.
        stage: pipeline stage.
        fused_channels: largest head dimension with fused attention.
    """
    model, T, element_bytes = here.model, here.tp, here.element_bytes
    N, D = here.tokens, model.hidden_size
    layers = here.layers
    features = (3 if model.gated else 2) * here.features
    experts = model.num_experts
    # Weights are read once; under `weights` a rank multiplies with those of its whole head group.
    gathered = here.cut.m if here.plan.exchange == "weights" else here.layout.gtp
    projections = here.packed * D
    if here.plan.exchange == "weights":  # gathered, they are without padding
        projections /= 1 + here.cut.waste
    parts = [
        Work(
            what="attention linears",
            flops=layers * 2 * N * projections / T,
            memory_bytes=layers
            * element_bytes
            * (projections * gathered + N * (here.packed + 2 * D))
            / T,
        )
    ]
    parts += _attention(here, fused_channels)
    size = {"sequence": here.sequence, "batch": here.layout.micro_batch}
    size |= {"microbatches": here.microbatches}
    there = back = 0.0
    for plan, number in here.plans:
        ordered = put_in_order(plan, here.cut, here.block, **size)
        there += number * element_bytes * ordered[0]
        back += number * element_bytes * ordered[1]
    if there or back:
        parts.append(Work(what="exchange, put in order", memory_bytes=there, backward_bytes=back))
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
    parts.append(_streamed(here, rows))
    if stage == here.stages - 1:
        words = N if here.in_loop else here.layout.micro_batch
        vocabulary = here.vocabulary / T
        moved = (vocabulary * D + words * vocabulary) * element_bytes
        parts.append(Work(what="LM head", flops=2 * words * vocabulary * D, memory_bytes=moved))
        if here.in_loop:
            parts.append(_cross_entropy(words * vocabulary, element_bytes))
    return parts


def _streamed(here: Deployment, rows: float) -> Work:
    """Norms, residual additions, activations and rotary embeddings of all layers, read and written.

    Forward a norm reads and writes the stream, an addition reads two and writes one; backward both
    read two and write one (the stream's gradient is a sum). An activation reads its features and
    writes half of them if gated; backward it reads the gradient, too, and writes as many as it has
    read. Queries are copied out of packed QKV, whose gradient is put together again.
    """
    model, T = here.model, here.tp
    tokens = here.tokens / T
    D, d, F = model.hidden_size, model.kv_channels, here.features
    H, K = model.num_attention_heads, here.groups
    forward = 10 * tokens * D + rows * (3 if model.gated else 2) * F
    backward = 12 * tokens * D + rows * (5 if model.gated else 3) * F
    rotated = 2 * tokens * (H + K) * d if model.rotary_dim else 0.0
    forward += rotated + 2 * tokens * H * d
    backward += rotated + 2 * tokens * (H + 2 * K) * d
    if here.gathers_qkv:  # put side by side, and apart again
        forward += 2 * here.tokens * here.qkv_rows
        backward += 2 * here.tokens * here.qkv_rows
    if model.num_experts:  # permuted for the dispatch, sorted by expert, and both undone
        forward += 8 * rows * D
        backward += 16 * rows * D
    scale = here.layers * here.element_bytes
    return Work(
        what="norms, residuals, activations",
        memory_bytes=scale * forward,
        backward_bytes=scale * backward,
    )


def _cross_entropy(logits: float, element_bytes: int) -> Work:
    """Of so many logits in fp32, as ``VocabParallelCrossEntropy`` passes over them.

    Forward: widened, largest, subtracted, exponential, sum, divided. Backward: scaled, narrowed.
    """
    widened = 4 + element_bytes if element_bytes < 4 else 0
    return Work(
        what="cross entropy",
        memory_bytes=logits * (widened + 4 + 8 + 8 + 4 + 8),
        backward_bytes=logits * (8 + widened),
    )


def _attention(here: Deployment, fused_channels: int) -> list[Work]:
    """Core attention: one part where fused; else two, of which each has one kind of work."""
    model, T = here.model, here.tp
    core = core_attention.of_layer(here, fused_channels=fused_channels)
    channels = model.num_attention_heads * model.kv_channels
    keys = here.batch.sequence_length * here.layout.micro_batch
    cache = 2 * here.groups * model.kv_channels * keys * core.keys_read
    moved = here.layers * here.element_bytes * (4 * here.tokens * channels + cache) / T
    # What each run of tokens attends to is laid out for it, then read.
    runs = 2 * core_attention.laid_out(here, fused_channels=fused_channels)
    moved += here.layers * here.element_bytes * runs * cache / here.cut.n
    flops, summed = here.layers * core.flops, []
    if core.merged_bytes:
        half = here.layers * core.merged_bytes / 2
        summed = [Work(what="parts of attention merged", memory_bytes=half, backward_bytes=half)]
    if core.summed_bytes:
        adds = here.layers * core.summed_bytes
        summed = [Work(what="gradients of keys and values added up", backward_bytes=adds)]
    if not core.score_bytes:
        return [Work(what="attention", flops=flops, memory_bytes=moved, fused=True), *summed]
    passes = here.layers * core.score_bytes
    return [
        Work(what="attention, unfused: products", flops=flops, memory_bytes=moved),
        Work(what="attention, unfused: scores", memory_bytes=passes),
        *summed,
    ]


def useful(here: Deployment) -> float:
    """Operations of a step of the whole model, attention causal: what no layout can avoid."""
    words = here.step_tokens if here.in_loop else here.batch.sequences
    keys = here.batch.keys * (1 if here.phase == "decode" else 0.5)
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
    mlp = 2 * (3 if model.gated else 2) * D * F * (model.moe_router_topk if E else 1) + 2 * D * E
    layer = 2 * D * (2 * H + 2 * K) * d + 4 * keys * H * d + mlp
    head = 2 * D * (vocabulary or model.vocab_size)
    return tokens * model.num_layers * layer + words * head

"""Memory of a rank: weights, gradients, optimizer, activations, KV cache, gathered weights.

Sources: Rajbhandari et al., "ZeRO" (2020), section 3.1, for the states of mixed-precision Adam;
Korthikanti et al., "Reducing activation recomputation in large transformer models" (2022), section
4, for the tensors a layer keeps, here without dropout and with each counted in its own width.
"""

from dataclasses import dataclass, fields, replace

from megatron_helix.planner import core_attention, fsdp, model_ends, parameters
from megatron_helix.planner.deployment import Deployment

MOMENT_BYTES = 8  # two, in fp32
MASTER_BYTES = 4  # the weight in fp32, where the model's is in half precision
WIDENED_BYTES = 4  # the gradient in fp32, where it is added up in half: while the optimizer works


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank, at the highest point of a step."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float
    kv_cache: float = 0.0
    gathered_weights: float = 0.0
    widened_gradients: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def of_rank(here: Deployment, stage: int, *, fused_channels: int) -> Memory:
    """What a rank of ``stage`` needs: in the passes, or at the step's end if that is more.

    Args:
        here: the deployment.
        stage: pipeline stage; the first one keeps the most micro-batches.
        fused_channels: largest head dimension with fused attention.
    """
    own, states = parameters.kept(here, stage), parameters.optimized(here, stage)
    train, loop = here.phase == "train", here.in_loop
    # Torch FSDP2 has no gradients before it makes those of the first micro-batch.
    fresh = here.layout.fsdp == "torch_fsdp2" and here.microbatches == 1
    gradients = own * here.gradient_bytes if loop else 0.0
    adam = MASTER_BYTES if here.element_bytes < MASTER_BYTES else 0
    adam += MOMENT_BYTES if train else 0  # which come with the first update
    inflight = min(here.stages - stage, here.microbatches) if train else 1
    core = core_attention.of_layer(here, fused_channels=fused_channels)
    passes = Memory(
        weights=own * here.element_bytes,
        gradients=0.0 if fresh else gradients,
        optimizer=states * adam if loop else 0.0,
        # Of one attention at a time, scores and their gradients.
        activations=inflight * _kept(here, stage, fused_channels) + core.passing_bytes,
        kv_cache=0.0 if loop else _cache(here),
        gathered_weights=_gathered(here, stage, train),
    )
    if train and here.plan.keeps_gradients:
        passes = _through_a_step(here, stage, passes)
    narrow = here.gradient_bytes < WIDENED_BYTES
    widened = states * WIDENED_BYTES if train and narrow else 0.0
    freed = {"activations": 0.0, "gathered_weights": 0.0}
    end = replace(passes, **freed, gradients=gradients, widened_gradients=widened)
    return max(passes, end, key=lambda memory: memory.total)


def _through_a_step(here: Deployment, stage: int, passes: Memory) -> Memory:
    """With the sums of a step's gradients of others' shards, which grow as activations go.

    The second micro-batch finds them all.
    """
    own = parameters.layer_matrices(here) * here.kept_layers + _kept_tables(here, stage)
    sums = own * (here.cut.m - 1) * here.gradient_bytes
    kept = passes.activations if here.microbatches == 1 else 0.0
    gathered = passes.gathered_weights + max(0.0, sums - kept)
    return replace(passes, gathered_weights=gathered)


def _kept_tables(here: Deployment, stage: int) -> float:
    """Parameters of a rank in embedding and head, where these are gathered for a step."""
    plan = model_ends.table_plan(here)
    if plan is None or not plan.keeps_weights:
        return 0.0
    return model_ends.gathered_parameters(here, stage)


def _kept(here: Deployment, stage: int, fused_channels: int) -> float:
    """Activations of a micro-batch: of all layers in training, else of half a layer at a time."""
    model, N = here.model, here.tokens / here.tp
    D, width = model.hidden_size, here.element_bytes
    rows = N
    if model.num_experts:
        rows = here.tokens / here.stream_ranks * model.moe_router_topk
    # QKV, context, and the softmax of the scores where they go through memory.
    attention = N * here.packed * width
    if here.gathers_qkv:  # queries, keys and values are views of what all ranks have
        attention += (here.tokens - N) * here.qkv_rows * width
    attention += core_attention.of_layer(here, fused_channels=fused_channels).kept_bytes
    # The keys and values that each run of tokens of packed rows attends to.
    of_token = 2 * here.groups * model.kv_channels / here.cut.n
    copies = core_attention.laid_out(here, fused_channels=fused_channels)
    attention += copies * of_token * here.tokens * width
    # Features before and after activation; what is routed in and out.
    mlp = rows * (3 if model.gated else 2) * here.features * width
    mlp += 2 * rows * D * width if model.num_experts else 0.0
    logits = 0.0
    if stage == here.stages - 1 and here.in_loop:
        logits = N * here.vocabulary * (width + 4)
    if here.phase == "train":  # and inputs of two norms and two linears, of the last norm and head
        ends = 2 * N * D * width if logits else 0.0
        return here.layers * (4 * N * D * width + attention + mlp) + ends + logits
    # The embedding, a layer's input, both norms' and both additions' outputs, which the layer's
    # functions still name; and the stream of all ranks, which linears gather.
    gathers = here.cut.n if here.plan.exchange == "weights" else here.stream_ranks
    stream = (6 + (gathers if gathers > 1 else 0)) * N * D * width
    return stream + max(attention, mlp, logits)


def _cache(here: Deployment) -> float:
    """Keys and values of all sequences of this rank; in prefill and decode alike."""
    sequences = here.batch.sequences / here.batch_ranks
    tokens = sequences * here.batch.sequence_length / here.layout.cp
    return cache_bytes_of_token(here) * tokens


def cache_bytes_of_token(here: Deployment) -> float:
    """Of one token on a rank, in all layers of its stage: 1/T, but under stock a group at least."""
    groups = here.groups / here.tp
    return here.element_bytes * 2 * groups * here.model.kv_channels * here.layers


def _gathered(here: Deployment, stage: int, train: bool) -> float:
    """Weights that are not a rank's own: the largest one at a time, beside those of a step."""
    if here.layout.fsdp:
        return fsdp.gathered_bytes(here, stage)
    shards = here.cut.m if here.plan.exchange == "weights" else here.layout.gtp
    if shards == 1:
        return 0.0
    layer = parameters.layer_matrices(here) / here.layout.gtp * shards
    kept = layer * here.kept_layers + _kept_tables(here, stage) * shards
    kept *= here.element_bytes
    all_kept = here.kept_layers == here.layers
    if all_kept and here.plan.keeps_gradients:
        return kept
    model, mlp = here.model, 0 if here.model.num_experts else here.features
    widest = max(here.packed, (2 if model.gated else 1) * mlp)
    shared = widest * model.hidden_size / here.tp * here.cut.m
    # In training its gradient beside it; under `weights` the parts that go out and that come in.
    gradients = (2 if here.plan.exchange == "weights" else 1) if train else 0
    return kept + shared * here.element_bytes * ((0 if all_kept else 1) + gradients)

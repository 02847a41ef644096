"""Memory of a rank: weights, gradients, optimizer, activations, KV cache, gathered weights.

Sources: Rajbhandari et al., "ZeRO" (2020), section 3.1, for the states of mixed-precision Adam;
Korthikanti et al., "Reducing activation recomputation in large transformer models" (2022), section
4, for the tensors a layer keeps, here without dropout and with each counted in its own width.
"""

from dataclasses import dataclass, fields, replace

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner import flops, parameters
from megatron_helix.planner.deployment import Deployment

MOMENT_BYTES = 8  # two, in fp32
MASTER_BYTES = 4  # the weight in fp32, where the model's is in half precision
WIDENED_BYTES = 4  # the gradient in fp32, where it is added up in fp16: while the optimizer works


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
    dense, experts = parameters.held(here, stage)
    train = here.phase == "train"
    sharded = here.layout.distributed_optimizer
    split = (here.replicas, here.expert_replicas) if sharded else (1, 1)
    states = dense / split[0] + experts / split[1]
    adam = MOMENT_BYTES + (MASTER_BYTES if here.element_bytes < MASTER_BYTES else 0)
    inflight = min(here.stages - stage, here.microbatches) if train else 1
    passes = Memory(
        weights=(dense + experts) * here.element_bytes,
        gradients=(dense + experts) * here.gradient_bytes if train else 0.0,
        optimizer=states * adam if train else 0.0,
        activations=inflight * _kept(here, stage, fused_channels) + _passing(here, fused_channels),
        kv_cache=0.0 if train else _cache(here),
        gathered_weights=_gathered(here, train),
    )
    widened = states * WIDENED_BYTES if train and here.precision == "fp16" else 0.0
    end = replace(passes, activations=0.0, gathered_weights=0.0, widened_gradients=widened)
    return max(passes, end, key=lambda memory: memory.total)


def _kept(here: Deployment, stage: int, fused_channels: int) -> float:
    """Activations of a micro-batch: of all layers in training, of one at a time in inference."""
    model, N = here.model, here.tokens / here.tp
    D = model.hidden_size
    rows = N
    if model.num_experts:
        rows = here.tokens / here.stream_ranks * model.moe_router_topk
    # Inputs of two norms and two linears; QKV and context; features before and after activation.
    layer = (
        N * (4 * D + packed(here.cut)) + rows * (3 if model.gated else 2) * model.ffn_hidden_size
    )
    if model.num_experts:
        layer += 2 * rows * D  # routed in, routed out
    layer_bytes = layer * here.element_bytes
    if not flops.is_fused(here, fused_channels):
        layer_bytes += flops.score_bytes(here)  # the softmax of the scores
    kept = layer_bytes * (here.layers if here.phase == "train" else 1)
    if stage == here.stages - 1 and here.phase == "train":
        kept += N * here.vocabulary * (here.element_bytes + 4)
    return kept


def _passing(here: Deployment, fused_channels: int) -> float:
    """Of one unfused attention, beside what is kept: scores; in training gradients of both."""
    if flops.is_fused(here, fused_channels):
        return 0.0
    return (2 if here.phase == "train" else 1) * flops.score_bytes(here)


def _cache(here: Deployment) -> float:
    """Keys and values of all sequences of this rank; in prefill and decode alike."""
    sequences = here.batch.sequences / here.batch_ranks
    tokens = sequences * here.batch.sequence_length / here.layout.cp
    return cache_bytes_of_token(here) * tokens


def cache_bytes_of_token(here: Deployment) -> float:
    """Of one token on a rank, in all layers of its stage: 1/T, but under stock a group at least."""
    model = here.model
    groups = model.query_groups / here.tp
    if not here.layout.is_helix:
        groups = max(groups, 1.0)
    return here.element_bytes * 2 * groups * model.kv_channels * here.layers


def _gathered(here: Deployment, train: bool) -> float:
    """Weights that are not a rank's own: the largest one at a time, or all of a step."""
    shards = here.cut.m if here.plan.exchange == "weights" else here.layout.gtp
    if shards == 1:
        return 0.0
    layer = parameters.layer_matrices(here) / here.layout.gtp * shards
    if here.plan.gather == "step" and train:
        return layer * here.layers * (here.element_bytes + here.gradient_bytes)
    model = here.model
    widest = max(packed(here.cut), (2 if model.gated else 1) * here.block.ffn)
    shared = widest * model.hidden_size / here.tp * here.cut.m
    # In training its gradient beside it; under `weights` the parts that go out and that come in.
    gradients = (2 if here.plan.exchange == "weights" else 1) if train else 0
    return shared * here.element_bytes * (1 + gradients)

"""Parameters that one rank holds, tensor by tensor, in elements.

Stock and helix alike keep 1/T of every matrix of attention and of a dense MLP; norms (weight and
bias) and routers are whole on every rank. Linears have no bias. Embedding and head are tied.
"""

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner.deployment import Deployment

NORM = 2  # weight and bias of a LayerNorm


def layer_matrices(here: Deployment) -> int:
    """Elements of one layer's attention and dense MLP on a tensor-parallel rank."""
    return here.block.weights(here.cut) // here.tp


def dense_tensors(here: Deployment, first: bool, last: bool) -> list[int]:
    """Sizes of what a rank of a stage holds beside experts; the embedding, if any, comes first."""
    model, shards = here.model, here.tp * here.layout.gtp
    D, d = model.hidden_size, model.kv_channels
    proj = model.num_attention_heads * d * D
    layer = [(packed(here.cut) * D - proj) // shards, proj // shards, *[D] * (2 * NORM)]
    if model.num_experts:
        layer.append(model.num_experts * D)  # router
    else:
        up = (2 if model.swiglu else 1) * model.ffn_hidden_size * D
        layer += [up // shards, model.ffn_hidden_size * D // shards]
    tensors = []
    if first or last:
        tensors.append(here.vocabulary * D // shards)
    if first and model.position_embedding_type == "learned_absolute":
        tensors.append(here.batch.sequence_length * D)
    tensors += layer * here.layers
    if last:
        tensors += [D] * NORM
    return tensors


def expert_tensors(here: Deployment) -> list[int]:
    """Sizes of the expert matrices that a rank of a stage holds; nothing for a dense model."""
    model, layout = here.model, here.layout
    if not model.num_experts:
        return []
    up = (2 if model.swiglu else 1) * model.ffn_hidden_size * model.hidden_size
    down = model.ffn_hidden_size * model.hidden_size
    mine = model.num_experts // layout.ep * here.layers
    return [up // layout.etp, down // layout.etp] * mine


def sequence_parallel(here: Deployment, last: bool) -> int:
    """Parameters that see 1/T of the tokens, so that their gradients are summed over T."""
    D = here.model.hidden_size
    layer = 2 * NORM * D + (here.model.num_experts or 0) * D
    return layer * here.layers + (NORM * D if last else 0)


def held(here: Deployment, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of ``stage``."""
    first, last = stage == 0, stage == here.stages - 1
    return sum(dense_tensors(here, first, last)), sum(expert_tensors(here))

"""Parameters that one rank holds, tensor by tensor, in elements.

Stock and helix alike keep 1/T of every matrix of attention and of a dense MLP, and of the biases of
what they cut by rows; norms, routers and the other biases are whole on every rank.
"""

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config import ModelConfig


def layer_matrices(here: Deployment) -> int:
    """Elements of one layer's attention and dense MLP on a tensor-parallel rank."""
    return here.block.weights(here.cut) // here.tp


def dense_tensors(here: Deployment, first: bool, last: bool) -> list[int]:
    """Sizes of what a rank of a stage holds beside experts; the embedding, if any, comes first."""
    model, shards = here.model, here.tp * here.layout.gtp
    D, d = model.hidden_size, model.kv_channels
    proj = model.num_attention_heads * d * D
    qkv = packed(here.cut) * D - proj
    layer = [qkv // shards, proj // shards, *column_biases(here), *_unsplit(model)]
    if model.softmax_type == "learnable":
        layer.append(model.num_attention_heads // here.cut.n)
    if not model.num_experts:
        up = (2 if model.gated else 1) * model.ffn_hidden_size
        layer += [up * D // shards, model.ffn_hidden_size * D // shards]
    table = here.vocabulary * D // shards
    untied = model.untie_embeddings_and_output_weights
    tensors = [table] if first or (last and not untied) else []
    if first and model.position_embedding_type == "learned_absolute":
        tensors.append((model.max_position_embeddings or here.batch.sequence_length) * D)
    tensors += layer * here.layers
    if last:
        tensors += [D] * _norm(model)
        tensors += [table] if untied else []
    return tensors


def column_biases(here: Deployment) -> list[int]:
    """Sizes of one layer's biases of QKV and of the dense MLP's features, 1/T of each."""
    model, biases = here.model, []
    if model.add_bias_linear or model.add_qkv_bias:
        heads = model.num_attention_heads + 2 * model.query_groups
        biases.append(heads * model.kv_channels // here.tp)
    if model.add_bias_linear and not model.num_experts:
        biases.append((2 if model.gated else 1) * model.ffn_hidden_size // here.tp)
    return biases


def expert_tensors(here: Deployment) -> list[int]:
    """Sizes of the expert tensors that a rank of a stage holds; nothing for a dense model."""
    model, layout = here.model, here.layout
    if not model.num_experts:
        return []
    D, up = model.hidden_size, (2 if model.gated else 1) * model.ffn_hidden_size
    expert = [up * D // layout.etp, model.ffn_hidden_size * D // layout.etp]
    expert += [up, D] if model.add_bias_linear else []
    return expert * (model.num_experts // layout.ep * here.layers)


def sequence_parallel(here: Deployment, last: bool) -> int:
    """Parameters that see 1/T of the tokens, so that their gradients are summed over T.

    And the biases of experts, which Megatron marks alike.
    """
    model = here.model
    ends = _norm(model) * model.hidden_size if last else 0
    experts = (model.num_experts or 0) // here.layout.ep if model.add_bias_linear else 0
    return (sum(_unsplit(model)) + experts * model.hidden_size) * here.layers + ends


def held(here: Deployment, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of ``stage``."""
    first, last = stage == 0, stage == here.stages - 1
    return sum(dense_tensors(here, first, last)), sum(expert_tensors(here))


def _norm(model: ModelConfig) -> int:
    """Tensors of a norm: a weight, and a LayerNorm's bias."""
    return 1 if model.normalization == "RMSNorm" else 2


def _unsplit(model: ModelConfig) -> list[int]:
    """Sizes of what is whole on every rank, of one layer: norms, router, biases added to the sum.

    Norms of queries and keys are of one head's channels.
    """
    D, E = model.hidden_size, model.num_experts or 0
    tensors = [D] * (2 * _norm(model))
    if model.qk_layernorm:
        tensors += [model.kv_channels] * (2 * _norm(model))
    if E:
        tensors.append(E * D)
    if model.add_bias_linear:
        tensors += [D, E or D]  # of attention's projection, and of the router or the dense MLP
    return tensors

"""Parameters that one rank holds, tensor by tensor, in elements.

Stock and helix alike keep 1/T of every matrix of attention and of a dense MLP, and of the biases of
what they cut by rows, helix with what pads smaller segments; norms, routers and the other biases
are whole on every rank. Tied, embedding and head are one table, of which the first and the last
stage have a copy each; untied, a table each. A shape is (rows, columns); a vector has one column.
"""

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.model import ModelConfig

Shapes = list[tuple[int, int]]


def layer_matrices(here: Deployment) -> int:
    """Elements of one layer's attention and dense MLP on a tensor-parallel rank."""
    repeated = packed(here.cut) - here.packed
    return (here.block.weights(here.cut) - repeated * here.model.hidden_size) // here.tp


def dense_tensors(here: Deployment, first: bool, last: bool) -> list[int]:
    """Sizes of what a rank of a stage holds beside experts; the embedding, if any, comes first."""
    return [rows * columns for rows, columns in dense_shapes(here, first, last)]


def dense_shapes(here: Deployment, first: bool, last: bool) -> Shapes:
    """The same as shapes, before data-parallel ranks shard anything."""
    before, after = end_shapes(here, first, last)
    return before + layer_shapes(here) * here.layers + after


def table(here: Deployment) -> tuple[int, int]:
    """Shape of a rank's part of the embedding or of the head."""
    return here.vocabulary // here.tp // here.layout.gtp, here.model.hidden_size


def end_shapes(here: Deployment, first: bool, last: bool) -> tuple[Shapes, Shapes]:
    """Shapes of what comes before and after the layers."""
    model, D = here.model, here.model.hidden_size
    untied = model.untie_embeddings_and_output_weights
    before = [table(here)] if first or (last and not untied) else []
    if first and model.position_embedding_type == "learned_absolute":
        before.append((model.max_position_embeddings or here.batch.sequence_length, D))
    after = _norm(model, D) if last else []
    return before, after + ([table(here)] if last and untied else [])


def layer_shapes(here: Deployment) -> Shapes:
    """Shapes of one layer beside experts; gtp's shards, as tp's, are rows of every matrix."""
    model, T, gtp = here.model, here.tp, here.layout.gtp
    D, F = model.hidden_size, here.features
    channels = model.num_attention_heads * here.cut.padded_channels
    shapes = [(here.qkv_rows // T // gtp, D), (D // gtp, channels // T)]
    shapes += [(size, 1) for size in column_biases(here)]
    shapes += _unsplit(model)
    if model.softmax_type == "learnable":
        shapes.append((model.num_attention_heads // here.cut.n, 1))
    if not model.num_experts:
        shapes += [((2 if model.gated else 1) * F // T // gtp, D), (D // gtp, F // T)]
    return shapes


def column_biases(here: Deployment) -> list[int]:
    """Sizes of one layer's biases of QKV and of the dense MLP's features, 1/T of each."""
    model, biases = here.model, []
    if model.add_bias_linear or model.add_qkv_bias:
        heads = model.num_attention_heads + 2 * model.query_groups
        biases.append(heads * here.cut.padded_channels // here.tp)
    if model.add_bias_linear and not model.num_experts:
        biases.append((2 if model.gated else 1) * here.features // here.tp)
    return biases


def expert_tensors(here: Deployment) -> list[int]:
    """Sizes of the expert tensors that a rank of a stage holds; nothing for a dense model."""
    return [rows * columns for rows, columns in expert_shapes(here) * here.layers]


def expert_shapes(here: Deployment) -> Shapes:
    """Shapes of one layer's experts on a rank."""
    model, layout = here.model, here.layout
    if not model.num_experts:
        return []
    D, F = model.hidden_size, here.features // layout.etp
    up = (2 if model.gated else 1) * F
    expert = [(up, D), (D, F)]
    expert += [(up, 1), (D, 1)] if model.add_bias_linear else []
    return expert * (model.num_experts // layout.ep)


def sequence_parallel(here: Deployment, last: bool) -> Shapes:
    """Shapes of what sees 1/T of the tokens, so that its gradients are summed over T.

    And of experts' biases, which Megatron marks alike.
    """
    model, D = here.model, here.model.hidden_size
    experts = (model.num_experts or 0) // here.layout.ep if model.add_bias_linear else 0
    layer = _unsplit(model) + [(D, 1)] * experts
    return layer * here.layers + (_norm(model, D) if last else [])


def whole_beside_shards(here: Deployment, first: bool, last: bool) -> int:
    """Elements of what gtp leaves whole on every rank: norms and biases, positions, offsets."""
    untied = here.model.untie_embeddings_and_output_weights
    rows, columns = table(here)
    tables = (first + last if untied else first or last) * rows * columns
    layers = layer_matrices(here) / here.layout.gtp * here.layers
    return round(sum(dense_tensors(here, first, last)) - tables - layers)


def held(here: Deployment, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters that a rank of ``stage`` computes with."""
    first, last = stage == 0, stage == here.stages - 1
    return sum(dense_tensors(here, first, last)), sum(expert_tensors(here))


def kept(here: Deployment, stage: int) -> float:
    """Of these what the rank keeps: with FSDP its shard."""
    return sum(n / shards for n, shards in zip(held(here, stage), here.weight_shards, strict=True))


def optimized(here: Deployment, stage: int) -> float:
    """Of these what the rank has the optimizer's states of."""
    return sum(n / shards for n, shards in zip(held(here, stage), here.state_shards, strict=True))


def _norm(model: ModelConfig, channels: int) -> Shapes:
    """Shapes of a norm: a weight, and a LayerNorm's bias."""
    return [(channels, 1)] * (1 if model.normalization == "RMSNorm" else 2)


def _unsplit(model: ModelConfig) -> Shapes:
    """Shapes of what is whole on every rank, of one layer: norms, router, biases added to the sum.

    Norms of queries and keys are of one head's channels.
    """
    D, E = model.hidden_size, model.num_experts or 0
    shapes = _norm(model, D) * 2
    if model.qk_layernorm:
        shapes += _norm(model, model.kv_channels) * 2
    if E:
        shapes.append((E, D))
    if model.add_bias_linear:
        shapes += [(D, 1), (E or D, 1)]  # of attention's projection; of the router or dense MLP
    return shapes

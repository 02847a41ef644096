"""Parameters that one rank holds, tensor by tensor, in elements.

Stock and helix alike keep 1/T of every matrix of attention and of a dense MLP; norms (weight and
bias) and routers are whole on every rank. Linears have no bias. Tied, embedding and head are one
table, of which the first and the last stage have a copy each; untied, a table each.
"""

from megatron_helix.exchange.traffic import packed
from megatron_helix.planner.deployment import Deployment

NORM = 2  # weight and bias of a LayerNorm


def layer_matrices(here: Deployment) -> int:
    """Elements of one layer's attention and dense MLP on a tensor-parallel rank."""
    return here.block.weights(here.cut) // here.tp


def dense_tensors(here: Deployment, first: bool, last: bool) -> list[int]:
    """Sizes of what a rank of a stage holds beside experts; the embedding, if any, comes first."""
    return [rows * columns for rows, columns in dense_shapes(here, first, last)]


def dense_shapes(here: Deployment, first: bool, last: bool) -> list[tuple[int, int]]:
    """The same as shapes, before data-parallel ranks shard anything; a vector has one column."""
    before, after = end_shapes(here, first, last)
    return before + layer_shapes(here) * here.layers + after


def end_shapes(
    here: Deployment, first: bool, last: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shapes of what comes before and after the layers."""
    table = (here.vocabulary // here.tp // here.layout.gtp, here.model.hidden_size)
    untied = here.model.untie_embeddings_and_output_weights
    before = [table] if first or (last and not untied) else []
    if first and here.model.position_embedding_type == "learned_absolute":
        before.append((here.batch.sequence_length, here.model.hidden_size))
    after = [(here.model.hidden_size, 1)] * NORM if last else []
    return before, after + ([table] if last and untied else [])


def layer_shapes(here: Deployment) -> list[tuple[int, int]]:
    """Shapes of one layer beside experts; gtp's shards, as tp's, are rows of every matrix."""
    model, T, gtp = here.model, here.tp, here.layout.gtp
    D, F = model.hidden_size, model.ffn_hidden_size
    channels = model.num_attention_heads * model.kv_channels
    shapes = [((packed(here.cut) - channels) // T // gtp, D), (D // gtp, channels // T)]
    shapes += [(D, 1)] * (2 * NORM)
    if model.num_experts:
        shapes.append((model.num_experts, D))  # router
    else:
        shapes += [((2 if model.swiglu else 1) * F // T // gtp, D), (D // gtp, F // T)]
    return shapes


def expert_tensors(here: Deployment) -> list[int]:
    """Sizes of the expert matrices that a rank of a stage holds; nothing for a dense model."""
    return [rows * columns for rows, columns in expert_shapes(here) * here.layers]


def expert_shapes(here: Deployment) -> list[tuple[int, int]]:
    """Shapes of one layer's experts on a rank."""
    model, layout = here.model, here.layout
    if not model.num_experts:
        return []
    D, F = model.hidden_size, model.ffn_hidden_size // layout.etp
    return [((2 if model.swiglu else 1) * F, D), (D, F)] * (model.num_experts // layout.ep)


def sequence_parallel(here: Deployment, last: bool) -> int:
    """Parameters that see 1/T of the tokens, so that their gradients are summed over T."""
    D = here.model.hidden_size
    layer = 2 * NORM * D + (here.model.num_experts or 0) * D
    return layer * here.layers + (NORM * D if last else 0)


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

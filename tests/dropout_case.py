"""A decoder block whose output shows what dropout dropped.

Its weights are chosen for that. Queries and keys are zero, so attention looks at all tokens alike;
the value of a token is the unit vector of its position. What attention gives for a query is then
its row of dropped probabilities. Output projections are zero and only have biases, each a power of
two: what a layer adds to the stream is the sum of the biases that were kept.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)

from megatron_helix.exchange.strategy import Choice
from megatron_helix.exchange.tokens import chunk_positions
from megatron_helix.layers.layer_spec import with_core_attention
from megatron_helix.partition.layout import HelixLayout
from tests import block_case
from tests.distributed import model_parallel

S, B, HEADS, HIDDEN, LAYERS = 32, 4, 4, 64, 2
RATE = 0.375  # 1 - RATE is exact in binary, and neither one half nor its own square
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How four ranks share the block; ``m`` of 0 is stock tensor parallelism."""

    m: int = 0
    exchange: str = "activations"
    split: str = "batch"
    sequence_parallel: bool = False
    causal: bool = True
    attention_rate: float = RATE
    hidden_rate: float = RATE
    recompute: tuple[str, ...] = ()  # modules; "full" is all
    core: str = "spec"

    @property
    def layout(self) -> HelixLayout | None:
        """The partition; a segment of a head holds one channel for each position."""
        if not self.m:
            return None
        return _block(self).layout(self.m, 4 // self.m)


@dataclass(kw_only=True)
class Seen:
    """What one rank has seen of the masks, True where something was kept.

    Attributes:
        attention: that of the first layer, once for every time that it was computed; ``[b, H, s,
            s]`` of this rank's sequences, heads and queries.
        later: the same in another forward pass.
        hidden: of the stream, ``[2 * layers, s, b, D]``, of this rank's tokens.
        scale: probabilities and biases that were kept, over what they would be without dropout and
            times the share that is kept: 1, if dropout does not change what is expected.
        gradient: of the input.
        state: of CUDA's generator, afterwards.
    """

    attention: list[torch.Tensor] = field(default_factory=list)
    later: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scale: list[torch.Tensor] = field(default_factory=list)
    gradient: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    state: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def run(cuts: dict[str, Cut]) -> dict[str, Seen]:
    """What this rank of four sees of each cut's masks."""
    seen = {}
    for m in sorted({cut.m for cut in cuts.values()}):
        with model_parallel(tp=4):  # helix groups are carved once for a tensor-parallel group
            for name, cut in cuts.items():
                if cut.m == m:
                    block = _build(cut)
                    model_parallel_cuda_manual_seed(1)
                    seen[name] = _look(block, cut)
    return seen


def whole_attention(cut: Cut, parts: list[torch.Tensor]) -> torch.Tensor:
    """The ranks' masks, put together: ``[b, H, s, s]``."""
    whole = torch.empty(B, HEADS, S, S, dtype=torch.bool)
    for rank, part in enumerate(parts):
        heads, sequences, tokens = _share(cut, rank)
        whole[sequences[:, None, None], heads[:, None], tokens] = part
    return whole


def whole_hidden(cut: Cut, parts: list[torch.Tensor]) -> torch.Tensor:
    """The ranks' masks of the stream, put together: ``[2 * layers, s, b, D]``."""
    return torch.cat(parts, dim=1) if cut.sequence_parallel else parts[0]


def _share(cut: Cut, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, sequences and queries whose attention a rank computes."""
    heads, sequences, tokens = torch.arange(HEADS), torch.arange(B), torch.arange(S)
    layout = cut.layout
    if layout is None:
        return heads.chunk(4)[rank], sequences, tokens
    i, j = layout.coordinates(rank)
    heads = heads.chunk(layout.n)[i]
    if cut.exchange == "scores":
        return heads, sequences, tokens
    if cut.split == "batch":
        return heads, sequences.chunk(layout.m)[j], tokens
    return heads, sequences, chunk_positions(layout, j, S)


def _block(cut: Cut) -> block_case.Block:
    recompute: dict[str, Any] = {}
    if cut.recompute == ("full",):
        recompute = FULL
    elif cut.recompute:
        recompute = {"recompute_granularity": "selective", "recompute_modules": [*cut.recompute]}
    return block_case.Block(
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        groups=HEADS,
        kv_channels=S * max(cut.m, 1),
        rope=False,
        bias=True,
        more={
            "attention_dropout": cut.attention_rate,
            "hidden_dropout": cut.hidden_rate,
            "layernorm_epsilon": 1e-12,
            **recompute,
        },
    )


def _build(cut: Cut) -> TransformerBlock:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    choice = Choice(exchange=cut.exchange, split=cut.split)
    layout = cut.layout if cut.m > 1 else None
    config, spec = block_case.describe(
        _block(cut), groups, layout, choice, sequence_parallel=cut.sequence_parallel
    )
    spec = with_core_attention(spec, cut.core)
    one_by_one = isinstance(spec, TransformerBlockSubmodules)
    for layer in spec.layer_specs if one_by_one else [spec]:
        mask_type = AttnMaskType.causal if cut.causal else AttnMaskType.padding
        attention = layer.submodules.self_attention
        params = {**attention.params, "attn_mask_type": mask_type}
        layer.submodules.self_attention = replace(attention, params=params)
    block = TransformerBlock(config, spec, post_layer_norm=False, pg_collection=groups)
    _choose_weights(block, cut)
    return block


def _choose_weights(block: TransformerBlock, cut: Cut) -> None:
    channels = _block(cut).kv_channels
    value = torch.zeros(channels, HIDDEN)
    # A norm of two elements that are not zero makes them as large as this divides by.
    value[torch.arange(channels), torch.arange(channels) % S] = (HIDDEN / 2) ** -0.5
    qkv = torch.zeros(HEADS, 3, channels, HIDDEN)
    qkv[:, 2] = value
    rows = cut.layout.qkv_rows() if cut.m > 1 and cut.layout else torch.arange(HEADS * 3 * channels)
    mine = qkv.view(-1, HIDDEN)[rows.chunk(4)[dist.get_rank()]]
    with torch.no_grad():
        for name, weight in block.named_parameters():
            weight.fill_(float("layernorm.weight" in name))
        for number, layer in enumerate(block.layers):
            layer.self_attention.linear_qkv.weight.copy_(mine)
            layer.self_attention.linear_proj.bias.fill_(2.0 ** (2 * number))
            layer.mlp.linear_fc2.bias.fill_(2.0 ** (2 * number + 1))


def _look(block: TransformerBlock, cut: Cut) -> Seen:
    seen = Seen()
    heads, _, tokens = _share(cut, dist.get_rank())
    looked_at = tokens + 1 if cut.causal else torch.full_like(tokens, S)

    def watch(module: Any, args: Any, context: torch.Tensor) -> None:
        rows = context.detach().view(*context.shape[:2], len(heads), -1, S)
        weights = rows[:, :, :, 0].permute(1, 2, 0, 3)  # [b, H, s, s]; of equal copies the first
        weights = weights * looked_at[:, None] * (1 - cut.attention_rate)
        kept = weights > 0.5
        seen.attention.append(kept)
        seen.scale.append(weights[kept])

    block.layers[0].self_attention.core_attention.register_forward_hook(watch)
    x = torch.eye(S, HIDDEN) - torch.eye(S, HIDDEN).roll(S, dims=1)  # of mean 0
    x = x[:, None].repeat(1, B, 1)
    if cut.sequence_parallel:
        x = x.chunk(4)[dist.get_rank()]
    x = x.contiguous().requires_grad_()
    output = block(x, None)
    custom_backward(output.square().sum(), None)
    added = (output - x).detach() * (1 - cut.hidden_rate)
    kept = added.round().to(torch.int64)
    powers = 2 ** torch.arange(2 * LAYERS)
    seen.hidden = (kept & powers.view(-1, 1, 1, 1)) != 0
    seen.scale.append(added[kept != 0] / kept[kept != 0])
    assert x.grad is not None
    seen.gradient, seen.state = x.grad, torch.cuda.get_rng_state()
    with torch.no_grad():
        block(x, None)
    seen.later = seen.attention.pop()
    return seen

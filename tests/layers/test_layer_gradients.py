"""Transformer layers cut m x n against Megatron's own on one rank, in double precision.

Output, input gradient and the gradient of every weight of a block of two layers (a first and a last
one, with what lies between), put together again from the shards.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.tiles import stored
from megatron_helix.upstream import patches
from tests import block_case
from tests.attention_case import OFFSET, TILED
from tests.block_case import Block
from tests.covering import fast
from tests.distributed import model_parallel, run_distributed

DOUBLE = {"dtype": torch.float64, "ffn": 60}  # which four ranks and six can share
BLOCKS = {
    "plain": Block(bias=True, **DOUBLE),
    "gated_gqa": Block(gated=True, heads=8, groups=2, **DOUBLE),
    "gated_bias": Block(gated=True, bias=True, rope=False, **DOUBLE),
    "qk_layer_norm": Block(bias=True, **DOUBLE, more={"qk_layernorm": True}),
    "qk_rms_norm": Block(**DOUBLE, more={"qk_layernorm": True, "normalization": "RMSNorm"}),
    # Four ranks share 17, 17, 16 and 16 features.
    "uneven": Block(ffn=66, bias=True, dtype=torch.float64),
    "uneven_gated": Block(ffn=66, bias=True, gated=True, dtype=torch.float64),
    "learnable_softmax": Block(**DOUBLE, more={"softmax_type": "learnable"}),
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How ranks share a block, and how many sequences of which length they get."""

    m: int
    n: int
    choice: Choice
    batch: int = 4
    sequence: int = 8

    def __str__(self) -> str:
        words = [self.choice.exchange, self.choice.split, self.choice.gather]
        return "-".join([f"{self.m}x{self.n}", *words, f"b{self.batch}"])


CUTS = [
    Cut(m=m, n=n, choice=Choice(exchange=exchange, split=split, gather=gather), batch=batch)
    for m, n in ((2, 2), (4, 1))
    for exchange, split, gather, batch in (
        ("activations", "batch", "microbatch", 4),
        ("activations", "sequence", "microbatch", 3),
        ("weights", "batch", "microbatch", 4),
        ("weights", "batch", "once", 4),
        ("weights", "batch", "step", 4),
        ("weights", "sequence", "microbatch", 3),
        ("scores", "auto", "microbatch", 1),
    )
] + [  # four rotary pairs, or eight channels, in three segments: tiles are padded
    Cut(m=3, n=2, choice=Choice(exchange=exchange, gather=gather), batch=batch, sequence=12)
    for exchange, gather, batch in (
        ("activations", "microbatch", 3),
        ("weights", "step", 3),
        ("weights", "microbatch", 2),
        ("scores", "microbatch", 1),
    )
]


def soon(cut: Cut) -> bool:
    """For the fast suite: all of two segments, and of more what is kept for a micro-batch alone.

    `activations` and `scores` change attention only, which tests/layers/test_attention_layer.py
    has in four segments; `scores` in three it has, too.
    """
    if cut.m == 2:
        return True
    others = {3: ("weights", "activations"), 4: ("weights",)}
    return cut.choice.gather == "microbatch" and cut.choice.exchange in others[cut.m]


SOON = [cut for cut in CUTS if soon(cut)]
Tensors = dict[str, torch.Tensor]


def shard(whole: torch.Tensor, name: str, layout: HelixLayout, rank: int, gated: bool):
    """A rank's part of a layer's weight."""
    of_attention = name.partition("self_attention.")[2]
    if of_attention in TILED:
        axis, order = TILED[of_attention]
        return stored(whole, order(layout).chunk(layout.size)[rank], axis)
    if of_attention == OFFSET:
        return whole.chunk(layout.n)[layout.coordinates(rank)[0]]
    if "linear_fc1" in name:
        projections = whole.chunk(2) if gated else [whole]
        return torch.cat([features(one, 0, layout.size, rank) for one in projections])
    if "linear_fc2.weight" in name:
        return features(whole, 1, layout.size, rank)
    return whole


def features(whole: torch.Tensor, axis: int, parts: int, rank: int) -> torch.Tensor:
    """A rank's part of the features along ``axis``, padded with zeros to the longest part."""
    parted = whole.tensor_split(parts, dim=axis)
    zeros = torch.zeros_like(parted[0].narrow(axis, 0, 1))
    padding = [zeros] * (parted[0].size(axis) - parted[rank].size(axis))
    return torch.cat([parted[rank], *padding], dim=axis)


def summed_over_ranks(name: str, weight: torch.nn.Parameter) -> bool:
    """The rule of megatron.core.distributed.finalize_model_grads."""
    return getattr(weight, "sequence_parallel", False) or any(
        norm in name for norm in ("q_layernorm", "k_layernorm")
    )


def whole(sequence: int, batch: int) -> dict[str, tuple[Tensors, Tensors]]:
    """(weights, expected) of every block. Runs in one rank."""
    results = {}
    with model_parallel():
        alone = ProcessGroupCollection.use_mpu_process_groups()
        for name, block in BLOCKS.items():
            layers = block_case.build(block, alone)
            weights = drawn(layers, block)
            results[name] = (
                weights,
                _step(layers, block, sequence, *_stream(sequence, batch, block)),
            )
    return results


def drawn(layers: torch.nn.ModuleList, block: Block) -> Tensors:
    """Weights for a whole block, which it is given."""
    weights = {
        name: _random(sum(map(ord, name)), *weight.shape) / block.hidden**0.5
        for name, weight in layers.named_parameters()
    }
    layers.load_state_dict(weights, strict=False)  # only Megatron's extra states are left
    return weights


def parts(cut: Cut, weights: dict[str, Tensors]) -> dict[str, Tensors]:
    """What a rank has of every block. Runs in all ranks."""
    results = {}
    patches.relax_head_check()
    with model_parallel(tp=cut.m * cut.n):
        rank = dist.get_rank()
        all_of_them = ProcessGroupCollection.use_mpu_process_groups()
        for name, block in BLOCKS.items():
            layout = block.layout(cut.m, cut.n)
            if block.groups % cut.n:
                continue
            part = block_case.build(block, all_of_them, layout, cut.choice)
            mine = dict(part.named_parameters())
            assert mine.keys() == weights[name].keys()
            with torch.no_grad():
                for key, weight in weights[name].items():
                    mine[key].copy_(shard(weight, key, layout, rank, block.gated))
            stream = (t.chunk(layout.size)[rank] for t in _stream(cut.sequence, cut.batch, block))
            results[name] = _step(part, block, cut.sequence, *stream)
            for key, weight in mine.items():
                if summed_over_ranks(key, weight):
                    dist.all_reduce(results[name][key])
    return results


def expected_of(name: str, cut: Cut, rank: int) -> Tensors:
    """A rank's part of what the whole block has."""
    block = BLOCKS[name]
    layout = block.layout(cut.m, cut.n)
    _, found = whole_results(cut.sequence, cut.batch)[name]
    return {
        key: tensor.chunk(layout.size)[rank]
        if key in ("output", "input")
        else shard(tensor, key, layout, rank, block.gated)
        for key, tensor in found.items()
    }


def _stream(sequence: int, batch: int, block: Block) -> list[torch.Tensor]:
    """Input, and gradient of the output."""
    return [_random(seed, sequence, batch, block.hidden) for seed in (1, 2)]


def _step(layers: torch.nn.ModuleList, block: Block, sequence: int, *part: torch.Tensor) -> Tensors:
    x, y_grad = part
    x = x.clone().requires_grad_()
    y = block_case.run(layers, block, x, sequence)
    custom_backward((y * y_grad).sum(), None)  # as Megatron's schedules call it
    finish_step([layers])
    grads = {name: weight.grad for name, weight in layers.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def whole_results(sequence: int, batch: int) -> dict[str, tuple[Tensors, Tensors]]:
    """Of every block, once for all cuts."""
    return run_distributed(whole, 1, sequence, batch)[0]


@cache
def results_of(cut: Cut) -> list[dict[str, Tensors]]:
    """Of every rank and block, run together: forking ranks costs more than what they do."""
    of_blocks = whole_results(cut.sequence, cut.batch).items()
    return run_distributed(parts, cut.m * cut.n, cut, {name: one[0] for name, one in of_blocks})


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("cut", fast(SOON, CUTS), ids=str)
def test_cut_layers_are_whole_layers(cut: Cut, name: str) -> None:
    # Two layers, a dozen sums of some hundred products: some thousand times the unit roundoff. It
    # is that of double precision; `scores` keeps scores and statistics of norms in single.
    single = cut.choice.exchange == "scores"
    tolerance = 2000 * torch.finfo(torch.float32 if single else torch.float64).eps
    for rank, of_rank in enumerate(results_of(cut)):
        expected, actual = expected_of(name, cut, rank), of_rank[name]
        assert expected.keys() == actual.keys()
        for key, tensor in expected.items():
            assert actual[key].shape == tensor.shape, key
            scale = tensor.abs().max()
            assert scale > 0, f"{key}: nothing to compare"
            error = (actual[key] - tensor).abs().max() / scale
            assert error <= tolerance, f"rank {rank}, {key}: off by {error:.1e} of its largest"

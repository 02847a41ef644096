"""Layers cut m x n on packed rows against Megatron's own on one rank, in double precision.

Output, input gradient and the gradient of every weight, as in
:mod:`tests.layers.test_layer_gradients`; and a packed row against its documents one by one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.exchange.strategy import Choice
from tests import block_case
from tests.block_case import Block
from tests.covering import fast
from tests.distributed import model_parallel, run_distributed
from tests.layers.test_layer_gradients import _random, shard, summed_over_ranks
from tests.packed_case import LENGTHS, params

S = 32
DOUBLE = torch.float64
BLOCKS = {
    # Five rotary pairs, of which neither two segments nor four are alike.
    "gated gqa": Block(gated=True, heads=8, groups=2, kv_channels=10, dtype=DOUBLE),
    "qk norm, gate, biases": Block(
        bias=True, dtype=DOUBLE, more={"qk_layernorm": True, "attention_output_gate": True}
    ),
    "window, offset": Block(
        dtype=DOUBLE, more={"softmax_type": "learnable", "window_size": (4, 0)}
    ),
    "one query group": Block(groups=1, rope=False, dtype=DOUBLE),
}


def padded_by_megatron() -> PackedSeqParams:
    """A row as reinforcement learning packs it: empty documents, positions of the row."""
    row = params([5, 9, 18])
    ghosts = torch.full((3,), S, dtype=torch.int32)
    row.cu_seqlens_q = row.cu_seqlens_kv = torch.cat([row.cu_seqlens_q, ghosts])
    row.max_seqlen_q = row.max_seqlen_kv = S
    return row


def row_of(documents: str) -> PackedSeqParams:
    """Megatron's parameters of one of the rows."""
    return params(LENGTHS[documents]) if documents in LENGTHS else padded_by_megatron()


ROWS = [*LENGTHS, "reinforcement learning"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How four ranks share a block."""

    m: int
    n: int
    choice: Choice

    def __str__(self) -> str:
        return f"{self.m}x{self.n}-{self.choice.exchange}" + "-in order" * bool(
            self.choice.keeps_order
        )


CUTS = [
    Cut(m=m, n=n, choice=Choice(exchange=exchange))
    for m, n in ((2, 2), (4, 1), (1, 4))
    for exchange in ("activations", "weights")
    if m > 1 or exchange == "activations"
]
CUTS.append(Cut(m=2, n=2, choice=Choice(exchange="weights", keeps_order="--some-flag")))

Tensors = dict[str, torch.Tensor]


def compare(cut: Cut) -> dict[tuple[str, str], tuple[Tensors, Tensors]]:
    """(expected, actual) by block and row; what a rank has. Runs in four ranks."""
    results = {}
    with model_parallel(tp=4):
        rank = dist.get_rank()
        alone = [dist.new_group([other]) for other in range(4)][rank]
        one = ProcessGroupCollection(tp=alone, cp=alone, pp=alone)
        four = ProcessGroupCollection.use_mpu_process_groups()
        for name, block in BLOCKS.items():
            if block.groups % cut.n:
                continue
            layout = block.layout(cut.m, cut.n)
            whole = block_case.build(block, one)
            part = block_case.build(block, four, layout, cut.choice)
            mine = dict(part.named_parameters())
            with torch.no_grad():
                for key, weight in whole.named_parameters():
                    weight.copy_(_random(sum(map(ord, key)), *weight.shape) / block.hidden**0.5)
                    mine[key].copy_(shard(weight, key, layout, rank, block.gated))
            x, y_grad = (_random(seed, S, 1, block.hidden) for seed in (1, 2))
            for documents in ROWS:
                expected = step(whole, block, x, y_grad, row_of(documents))
                actual = step(
                    part, block, x.chunk(4)[rank], y_grad.chunk(4)[rank], row_of(documents)
                )
                for key in ("output", "input"):
                    expected[key] = expected[key].chunk(4)[rank]
                for key, weight in mine.items():
                    if summed_over_ranks(key, weight):
                        dist.all_reduce(actual[key])
                    expected[key] = shard(expected[key], key, layout, rank, block.gated)
                results[name, documents] = expected, actual
    return results


def step(
    layers: torch.nn.ModuleList,
    block: Block,
    x: torch.Tensor,
    y_grad: torch.Tensor,
    row: PackedSeqParams,
) -> Tensors:
    """Output and gradients of one packed row."""
    x = x.clone().requires_grad_()
    layers.zero_grad()
    longest = row.max_seqlen_q
    y = block_case.run(layers, block, x, longest, packed_seq_params=row)
    custom_backward((y * y_grad).sum(), None)  # as Megatron's schedules call it
    grads = {name: weight.grad.clone() for name, weight in layers.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


@cache
def results_of(cut: Cut) -> list[dict[Any, tuple[Tensors, Tensors]]]:
    """Of every rank, block and row, run together."""
    return run_distributed(compare, 4, cut)


@pytest.mark.parametrize("documents", ROWS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("cut", fast(CUTS[1:2], CUTS), ids=str)
def test_cut_layers_are_whole_layers(cut: Cut, name: str, documents: str) -> None:
    if BLOCKS[name].groups % cut.n:
        return  # n divides the query groups
    tolerance = 2000 * torch.finfo(DOUBLE).eps  # as of rows that are not packed
    for rank, of_rank in enumerate(results_of(cut)):
        expected, actual = of_rank[name, documents]
        assert expected.keys() == actual.keys()
        for key, tensor in expected.items():
            assert actual[key].shape == tensor.shape, key
            scale = tensor.abs().max()
            # A token alone attends to itself, whatever its query and key are: no gradient at all.
            assert scale > 1e-9 or documents == "one token", f"{key}: nothing to compare"
            error = (actual[key] - tensor).abs().max() / scale.clamp_min(1e-2)
            assert error <= tolerance, f"rank {rank}, {key}: off by {error:.1e} of its largest"


def one_by_one() -> None:
    """A packed row, and its documents as rows of their own, on one rank."""
    with model_parallel():
        alone = ProcessGroupCollection.use_mpu_process_groups()
        for block in BLOCKS.values():
            layers = block_case.build(block, alone)
            x = _random(1, S, 1, block.hidden)
            for documents in LENGTHS:
                row = row_of(documents)
                longest = int(row.max_seqlen_q)
                packed = block_case.run(layers, block, x, longest, packed_seq_params=row)
                parts = [
                    block_case.run(layers, block, part, len(part))
                    for part in x.split(LENGTHS[documents])
                ]
                torch.testing.assert_close(packed, torch.cat(parts))


def test_a_packed_row_is_its_documents() -> None:
    run_distributed(one_by_one, 1)

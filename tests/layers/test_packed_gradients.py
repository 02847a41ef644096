"""Layers cut m x n on packed rows against Megatron's own on one rank, in double precision.

Output, input gradient and the gradient of every weight, as in
:mod:`tests.layers.test_layer_gradients`; and a packed row against its documents one by one.
"""

from dataclasses import dataclass
from functools import cache

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
from tests.layers.test_layer_gradients import _random, drawn, shard, summed_over_ranks
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

SOON = next(cut for cut in CUTS if str(cut) == "2x2-weights")

Tensors = dict[str, torch.Tensor]


def whole() -> dict[str, tuple[Tensors, dict[str, Tensors]]]:
    """Weights of every block, and what is expected of every row. Runs in one rank."""
    results = {}
    with model_parallel():
        alone = ProcessGroupCollection.use_mpu_process_groups()
        for name, block in BLOCKS.items():
            layers = block_case.build(block, alone)
            weights, stream = drawn(layers, block), _stream(block)
            of_rows = {row: step(layers, block, *stream, row_of(row)) for row in ROWS}
            results[name] = weights, of_rows
    return results


def parts(cut: Cut, weights: dict[str, Tensors]) -> dict[str, dict[str, Tensors]]:
    """What a rank has of every block and row. Runs in four ranks."""
    results = {}
    with model_parallel(tp=4):
        rank = dist.get_rank()
        four = ProcessGroupCollection.use_mpu_process_groups()
        for name, block in BLOCKS.items():
            if block.groups % cut.n:
                continue
            layout = block.layout(cut.m, cut.n)
            part = block_case.build(block, four, layout, cut.choice)
            mine = dict(part.named_parameters())
            with torch.no_grad():
                for key, weight in weights[name].items():
                    mine[key].copy_(shard(weight, key, layout, rank, block.gated))
            results[name] = {}
            for documents in ROWS:
                stream = (tensor.chunk(4)[rank] for tensor in _stream(block))
                actual = step(part, block, *stream, row_of(documents))
                for key, weight in mine.items():
                    if summed_over_ranks(key, weight):
                        dist.all_reduce(actual[key])
                results[name][documents] = actual
    return results


def _stream(block: Block) -> list[torch.Tensor]:
    """Input, and gradient of the output."""
    return [_random(seed, S, 1, block.hidden) for seed in (1, 2)]


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
def whole_results() -> dict[str, tuple[Tensors, dict[str, Tensors]]]:
    """Of every block and row, once for all cuts."""
    return run_distributed(whole, 1)[0]


@cache
def results_of(cut: Cut) -> list[dict[str, dict[str, Tensors]]]:
    """Of every rank, block and row, run together."""
    return run_distributed(parts, 4, cut, {name: one[0] for name, one in whole_results().items()})


@pytest.mark.parametrize("documents", ROWS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("cut", fast([SOON], CUTS), ids=str)
def test_cut_layers_are_whole_layers(cut: Cut, name: str, documents: str) -> None:
    if BLOCKS[name].groups % cut.n:
        return  # n divides the query groups
    tolerance = 2000 * torch.finfo(DOUBLE).eps  # as of rows that are not packed
    block, whole = BLOCKS[name], whole_results()[name][1][documents]
    layout = block.layout(cut.m, cut.n)
    for rank, of_rank in enumerate(results_of(cut)):
        actual = of_rank[name][documents]
        assert whole.keys() == actual.keys()
        for key, of_whole in whole.items():
            in_stream = key in ("output", "input")
            tensor = (
                of_whole.chunk(4)[rank]
                if in_stream
                else shard(of_whole, key, layout, rank, block.gated)
            )
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

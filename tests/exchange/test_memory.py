"""What the weights exchange keeps in memory, against stock tensor parallelism on as many ranks.

Measured in live ranks: the most bytes that tensors of a forward and backward pass held at once.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.weight_forms import finish_step
from tests import block_case
from tests.block_case import Block
from tests.covering import THOROUGH
from tests.distributed import model_parallel, run_distributed
from tests.live_bytes import LiveBytes

S, B = 32, 4
BLOCK = Block(layers=4, hidden=64, ffn=256, kv_channels=16)
GATED = Block(layers=4, hidden=64, ffn=256, kv_channels=16, gated=True)
CASES = ["2-plain", "2-gated", "4-plain", "4-gated"]


def peak_bytes(block: Block, m: int, choice: Choice | None) -> int:
    """Of a forward and backward pass on this rank of four; without a choice, of stock."""
    with model_parallel(tp=4):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layout = block.layout(m, 4 // m) if choice else None
        layers = block_case.build(block, groups, layout, choice or Choice())
        x = torch.randn(S // 4, B, block.hidden, requires_grad=True)
        with LiveBytes() as live:
            block_case.run(layers, block, x, S).sum().backward()
            finish_step([layers])
    return live.peak


@pytest.mark.parametrize(
    ("m", "block"),
    [
        pytest.param(*case, marks=() if case == (4, GATED) else THOROUGH)
        for case in product([2, 4], [BLOCK, GATED])
    ],
    ids=CASES,
)
def test_weights_needs_at_most_one_layers_gathered_weights_more(m: int, block: Block) -> None:
    n = 4 // m
    attention = (block.heads + 2 * block.groups + block.heads) * block.kv_channels * block.hidden
    mlp = (3 if block.gated else 2) * block.ffn * block.hidden
    one_layer = (attention + mlp) // n * 4  # bytes
    stock = run_distributed(peak_bytes, 4, block, m, None)
    gathered = Choice(exchange="weights", split="batch")
    once = Choice(exchange="weights", split="batch", gather="once")
    kept = Choice(exchange="weights", split="batch", gather="step")
    half = replace(once, gather_layers=2)
    by_microbatch = run_distributed(peak_bytes, 4, block, m, gathered)
    by_once = run_distributed(peak_bytes, 4, block, m, once)
    by_half = run_distributed(peak_bytes, 4, block, m, half)
    by_step = run_distributed(peak_bytes, 4, block, m, kept)
    for rank in range(4):
        assert by_microbatch[rank] - stock[rank] <= one_layer
        # Gathered once a step, the weights of all layers stay: here this would show.
        assert by_once[rank] - by_microbatch[rank] > (block.layers - 1) * one_layer
        # Of two layers of four two copies, beside what is gathered and freed as ever.
        assert one_layer < by_half[rank] - by_microbatch[rank] <= 2 * one_layer
        assert by_step[rank] - by_microbatch[rank] > (block.layers - 1) * one_layer


def test_live_bytes_counts_storages_once_and_forgets_them() -> None:
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x.view(10, 10).t()  # the same memory
        assert (live.now, live.peak) == (400, 400)
        z = y.clone()
        del z
        assert (live.now, live.peak) == (400, 800)
        x.add_(1)
        del x, y
        assert live.now == 0

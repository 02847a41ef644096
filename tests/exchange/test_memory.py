"""What the weights exchange keeps in memory, against stock tensor parallelism on as many ranks.

Measured in live ranks: the most bytes that tensors of a forward and backward pass held at once.
"""

import weakref
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.linear import finish_step
from tests import block_case
from tests.block_case import Block
from tests.covering import covering
from tests.distributed import model_parallel, run_distributed

S, B = 32, 4
BLOCK = Block(layers=4, hidden=64, ffn=256, kv_channels=16)
GATED = Block(layers=4, hidden=64, ffn=256, kv_channels=16, gated=True)
CASES = ["2-plain", "2-gated", "4-plain", "4-gated"]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside it made and nobody has let go; the most ever."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._storage(x)._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_tensor(tensor) and self._storage(tensor)._cdata not in before | self._known:
                self._count(self._storage(tensor))
        return result

    @staticmethod
    def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
        return tensor.untyped_storage()

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


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


@pytest.mark.parametrize(("m", "block"), covering(product([2, 4], [BLOCK, GATED])), ids=CASES)
def test_weights_needs_at_most_one_layers_gathered_weights_more(m: int, block: Block) -> None:
    n = 4 // m
    attention = (block.heads + 2 * block.groups + block.heads) * block.kv_channels * block.hidden
    mlp = (3 if block.gated else 2) * block.ffn * block.hidden
    one_layer = (attention + mlp) // n * 4  # bytes
    stock = run_distributed(peak_bytes, 4, block, m, None)
    gathered = Choice(exchange="weights", split="batch")
    kept = Choice(exchange="weights", split="batch", gather="step")
    by_microbatch = run_distributed(peak_bytes, 4, block, m, gathered)
    by_step = run_distributed(peak_bytes, 4, block, m, kept)
    for rank in range(4):
        assert by_microbatch[rank] - stock[rank] <= one_layer
        # Gathered once a step, the weights of all layers stay: here this would show.
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

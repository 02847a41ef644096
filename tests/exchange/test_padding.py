"""What pads tiles stays zero: weights, what the optimizer keeps of them, and their gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_helix import pretrain_gpt
from megatron_helix.partition.layout import PADDING
from megatron_helix.upstream import patches
from tests.covering import fast
from tests.distributed import run_distributed, tiny_gpt

STEPS = 50
PRECISIONS = {
    "fp32": ("--clip-grad", "0.1"),
    # From a scale at which gradients overflow, until they do not.
    "fp16": ("--fp16", "--initial-loss-scale", str(2**32), "--min-loss-scale", "1"),
    "momentum": ("--optimizer", "sgd", "--sgd-momentum", "0.9"),
}
EXCHANGES = {
    "fp32": ("--helix-exchange", "weights"),
    "fp16": ("--helix-exchange", "activations"),
    "momentum": ("--helix-exchange", "scores"),
}


def train(argv: list[str]) -> tuple[int, int, list[str]]:
    """Padded elements and others of a rank that were looked at, and where one is not zero."""
    seen: dict[str, Any] = {}

    def observed(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen["model"], seen["optimizer"] = args[2], args[3]
        return train_step(*args, **kwargs)

    patches.observe_train_step(observed)
    pretrain_gpt.train(argv)
    padded = others = 0
    faults = []
    for name, weight, axis, padding in _tiles(seen["model"]):
        for what, tensor in _kept(weight, seen["optimizer"]).items():
            found = tensor.index_select(axis, padding)
            padded += found.numel()
            others += int(tensor.count_nonzero())
            if found.count_nonzero():
                faults.append(f"{what} of {name}")
    return padded, others, faults


def _tiles(model: list[torch.nn.Module]) -> Iterator[tuple[str, Any, int, torch.Tensor]]:
    """Every weight and bias that is cut in tiles, along which axis, and its padded indices."""
    linears: list[tuple[str, Any]] = [
        found
        for chunk in model
        for found in chunk.named_modules()
        if hasattr(found[1], "tile_order")
    ]
    for name, linear in linears:
        order = linear.tile_order.chunk(linear.helix_layout.size)[linear.helix_groups.tp.rank()]
        padding = (order == PADDING).nonzero().squeeze(1)
        for part in linear.tiled:
            yield f"{name}.{part}", getattr(linear, part), linear.axis, padding


def _kept(weight: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """The weight, its gradient, and what the optimizer has of it."""
    found = {"weight": weight, "gradient": weight.main_grad}
    master = getattr(weight, "main_param", None)
    if master is not None:
        found["master"] = master
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        state = one.optimizer.state.get(weight if master is None else master, {})
        found |= {key: value for key, value in state.items() if value.shape == weight.shape}
    return found


@pytest.mark.parametrize("precision", fast(["fp16"], PRECISIONS))
def test_padding_stays_zero_in_every_optimizer(corpus_prefix: Path, precision: str) -> None:
    flags = tiny_gpt(
        corpus_prefix,
        *("--sequence-parallel", "--helix-m", "3", "--helix-n", "1", *EXCHANGES[precision]),
        *("--num-layers", "1", "--hidden-size", "24", "--ffn-hidden-size", "48", "--vocab-size"),
        *("252", "--seq-length", "12", "--micro-batch-size", "3", "--global-batch-size", "3"),
        *("--attention-output-gate", "--weight-decay", "0.5", "--lr", "0.05"),
        *PRECISIONS[precision],
        train_iters=STEPS,
    )
    ranks = run_distributed(train, 3, pretrain_gpt.prepare(flags, 3))
    assert all(not faults for _, _, faults in ranks), ranks
    # Eight rotary pairs are cut into two, three and three.
    assert ranks[0][0]
    assert not ranks[1][0] + ranks[2][0]
    assert all(others for _, others, _ in ranks)

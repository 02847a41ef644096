"""Features of MLPs and experts that the ranks do not divide: stock's numbers, and padding of zeros.

What of it is about one module stands beside that module's tests; here are whole trainings.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_helix import pretrain_gpt
from megatron_helix.upstream import patches
from tests.covering import THOROUGH, fast
from tests.distributed import Curve, pretrain, run_distributed, tiny_gpt

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py

TP, SP = "--tensor-model-parallel-size", "--sequence-parallel"
# What 2, 3, 5 and 6 ranks can share but for the features, of which 2 divides 254 and 38.
SIZES = (
    *("--num-attention-heads", "6", "--kv-channels", "60", "--num-layers", "1"),
    *("--hidden-size", "32", "--ffn-hidden-size", "254", "--seq-length", "30"),
    *("--vocab-size", "270", "--make-vocab-size-divisible-by", "1"),
    *("--micro-batch-size", "2", "--global-batch-size", "4"),
)
GATED = ("--swiglu", "--disable-bias-linear")
EXPERTS = (
    *("--disable-bias-linear", "--num-experts", "2", "--moe-router-topk", "2", SP),
    *("--moe-ffn-hidden-size", "38", "--moe-router-load-balancing-type", "none"),
    *("--moe-shared-expert-intermediate-size", "46"),
)
STEP = ("--helix-exchange", "weights", "--helix-gather", "step")
STEPS = 50

Train = Callable[..., Curve]


@pytest.fixture
def train(corpus_prefix: Path) -> Train:
    """Train a small model on as many ranks."""

    def run(size: int, *flags: str) -> Curve:
        return pretrain(tiny_gpt(corpus_prefix, *SIZES, *flags), size)

    return run


def cut(m: int, n: int, *more: str) -> tuple[str, ...]:
    """Flags of a helix layout."""
    return ("--helix-m", str(m), "--helix-n", str(n), "--helix-split", "sequence", SP, *more)


CASES = {
    "3x1 activations": (cut(3, 1, "--helix-exchange", "activations"), ()),
    "3x1 weights, gated": (cut(3, 1, "--helix-exchange", "weights"), GATED),
    "1x3": (cut(1, 3), ("--squared-relu",)),
    "5x1 weights": (cut(5, 1, "--helix-exchange", "weights"), ()),
    "2x3 step, gated": (cut(2, 3, *STEP), ("--disable-bias-linear", "--quick-geglu")),
    "3x1 experts": (
        cut(3, 1),
        (*EXPERTS, "--moe-token-dispatcher-type", "alltoall", "--swiglu"),
    ),
    "3x1 experts, gathered tokens": (
        cut(3, 1, "--helix-exchange", "weights"),
        (*EXPERTS, "--moe-token-dispatcher-type", "allgather", "--swiglu"),
    ),
    "5x1 experts, gathered tokens": (
        cut(5, 1, "--helix-exchange", "activations"),
        (*EXPERTS, "--moe-token-dispatcher-type", "allgather", "--squared-relu"),
    ),
}


@pytest.mark.parametrize("case", fast(["3x1 weights, gated", "1x3", "3x1 experts"], CASES))
def test_features_that_the_ranks_do_not_divide_give_stocks_numbers(train: Train, case: str) -> None:
    layout, model = CASES[case]
    m, n = (int(layout[i]) for i in (1, 3))
    stock = train(2, TP, "2", SP, *model)
    helix = train(m * n, *layout, *model)
    assert helix.losses == pytest.approx(stock.losses, rel=LOSS_TOLERANCE, abs=0)
    assert helix.grad_norms == pytest.approx(stock.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


SCALED = ("--fp16", "--initial-loss-scale", "1048576", "--hysteresis", "1")
FEATURES = {"mlp.linear_": 254, "mlp.experts": 38, "mlp.shared_experts": 46}


def padding_after(argv: list[str], ranks: int) -> list[tuple[str, float]]:
    """The largest entry of every tensor's padding on this rank after a training, by its name."""
    found, steps = [], 0

    def observed(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal found, steps
        result = train_step(*args, **kwargs)
        steps += 1
        if steps == STEPS:
            found = list(_paddings(args[2], args[3], ranks))
        return result

    patches.observe_train_step(observed)
    pretrain_gpt.train(argv)
    assert steps == STEPS
    return [(name, float(padding.detach().abs().max())) for name, padding in found]


def _paddings(model: Any, optimizer: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Padding of weights, gradients, weights in single precision and moments."""
    states: dict[Any, dict[str, Any]] = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        states |= one.optimizer.state
    for chunk in model:
        for name, weight in chunk.named_parameters():
            axis = 1 if "linear_fc2.weight" in name else 0 if "linear_fc1" in name else None
            if axis is None:
                continue
            features = next(count for part, count in FEATURES.items() if part in name)
            real = features // ranks + (dist.get_rank() < features % ranks)
            share = -(-features // ranks)
            master = getattr(weight, "main_param", weight)
            tensors = {"weight": weight, "gradient": weight.main_grad, "master": master}
            tensors |= {key: moment for key, moment in states[master].items() if key != "step"}
            for kind, tensor in tensors.items():
                padding = tensor.unflatten(axis, (-1, share)).narrow(axis + 1, real, share - real)
                assert tensor.any(), (name, kind)
                if padding.numel():
                    yield f"{name}: {kind}", padding


@THOROUGH  # in the fast suite attention has as many: tests/exchange/test_padding.py
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", [(), (*EXPERTS, "--swiglu")], ids=["dense", "experts"])
def test_padding_is_zero_after_fifty_steps(
    corpus_prefix: Path, precision: str, model: tuple[str, ...]
) -> None:
    decayed = ("--weight-decay", "0.1", "--clip-grad", "0.1")
    short = ("--seq-length", "6", "--num-attention-heads", "3", "--kv-channels", "6")
    short = (*short, "--global-batch-size", "2", "--log-interval", "50")
    kind = SCALED if precision == "fp16" else ()
    flags = tiny_gpt(
        *(corpus_prefix, *SIZES, *cut(3, 1), *short, *decayed, *kind, *model), train_iters=STEPS
    )
    argv = pretrain_gpt.prepare(flags, 3)
    of_ranks = run_distributed(padding_after, 3, argv, 3)
    assert not all(of_ranks) or model  # 254 = 3 x 84 + 2: the first two ranks have none
    assert any(of_ranks)
    for found in of_ranks:
        assert [(name, entry) for name, entry in found if entry != 0.0] == []

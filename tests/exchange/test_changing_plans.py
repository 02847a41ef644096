"""Micro-batches of one step that take different exchanges: the gradients of one rank all the same.

With Megatron's data parallelism, whose hook adds a gradient to ``main_grad`` unless a fused linear
says that it has; with fused linears, emulated, and without; with buckets sent off early.
"""

import dataclasses
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers

from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice
from tests import gradients_case
from tests.block_case import Block
from tests.covering import THOROUGH
from tests.distributed import model_parallel, run_distributed
from tests.gradients_case import Model

RANKS = 4
ACTIVATIONS = Plan(exchange="activations", split="batch")
SEQUENCE = Plan(exchange="activations", split="sequence")
WEIGHTS = Plan(exchange="weights", split="batch")
CHUNKS = Plan(exchange="weights", split="sequence")
ONCE = Plan(exchange="weights", split="batch", gather="once")
STEP = Plan(exchange="weights", split="batch", gather="step")
STEPS = {
    "there and back": (ACTIVATIONS, WEIGHTS, SEQUENCE),
    "back and there": (WEIGHTS, ACTIVATIONS, CHUNKS),
    "kept": (STEP, ACTIVATIONS, WEIGHTS, STEP),
    "kept once": (ONCE, ACTIVATIONS, ONCE, WEIGHTS),
}
OVERLAPPED = {"overlap_grad_reduce": True, "use_distributed_optimizer": True, "bucket_size": 4096}
BLOCK = Block(heads=4, groups=4, kv_channels=8, bias=True)


def _fuse(_input: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
    main_grad.add_(grad.t() @ _input)


def compare(
    fused: bool, tied: bool, overlapped: bool, frozen: Sequence[str], segments: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Largest error of each weight's gradient, relative to its largest, by step and weight."""
    # Megatron's own fused linears, with the two functions of the extension that they call.
    extension = SimpleNamespace(wgrad_gemm_accum_fp32=_fuse, wgrad_gemm_accum_fp16=_fuse)
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = extension, True
    more = {"gradient_accumulation_fusion": fused}
    block = dataclasses.replace(BLOCK, more=more)
    plain = Model(block=dataclasses.replace(BLOCK, dtype=torch.float64), tied=tied)
    ddp = {"grad_reduce_in_fp32": True, **(OVERLAPPED if overlapped else {})}
    model = Model(block=block, tied=tied, ddp=ddp)
    found: dict[str, dict[str, float]] = {}
    with model_parallel(tp=RANKS):
        rank = dist.get_rank()
        alone = [dist.new_group([other]) for other in range(RANKS)][rank]
        one = ProcessGroupCollection(tp=alone, cp=alone, pp=alone, embd=alone)
        all_ranks = ProcessGroupCollection.use_mpu_process_groups()
        for m in segments:
            parallel_state._HELIX_GROUPS = None  # type: ignore[attr-defined]  # of another m
            layout = BLOCK.layout(m, RANKS // m)
            part = model.build(all_ranks, layout, Choice(exchange="weights"))
            whole = plain.build(one)
            weights = model.drawn(whole, torch.float32)
            plain.load(whole, weights, None)
            model.load(part, weights, layout)
            for name, weight in part.named_parameters():
                weight.requires_grad_(not any(word in name for word in frozen))
            wrapped = model.in_ddp(part)
            for name, plans in STEPS.items():
                if overlapped and STEP in plans:
                    continue
                whole.zero_grad()
                expected = gradients_case.reference(whole, len(plans), model.words)
                actual = gradients_case.step(wrapped, plans, model.words)
                idle = [w for w in part.parameters() if not w.requires_grad]
                assert bool(idle) == bool(frozen)
                assert all(weight.grad is None for weight in idle)
                found[f"{name}, m = {m}"] = {
                    weight: _error(gradient, model.part(weight, expected[weight], layout))
                    for weight, gradient in actual.items()
                }
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("fused", "tied", "overlapped"),
    [
        pytest.param(*case, marks=() if all(case) else THOROUGH)
        for case in product([False, True], repeat=3)
    ],
)
def test_a_step_of_changing_plans_has_every_gradient(
    fused: bool, tied: bool, overlapped: bool
) -> None:
    _assert_all(run_distributed(compare, RANKS, fused, tied, overlapped, (), (2, 4)))


def test_frozen_weights_are_left_alone() -> None:
    frozen = ("linear_fc1", "embedding")
    _assert_all(run_distributed(compare, RANKS, True, False, False, frozen, (2,)))


def _assert_all(results: list[dict[str, dict[str, float]]]) -> None:
    for rank, steps in enumerate(results):
        for step, errors in steps.items():
            for weight, error in errors.items():
                # Single precision, through two layers; a lost micro-batch is off by far more.
                assert error <= 1e-4, f"rank {rank}, {step}, {weight}: off by {error:.1e}"

"""Runs that save and go on, and what is compared of them: curves, and tensors in checkpoints."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from megatron_helix import pretrain_gpt
from tests.distributed import Curve, living_ranks, run_distributed

STEPS, SAVED_STEP = 4, 2

# As in test_parity.py: single precision, summed in another order.
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

# Every kind of parameter that attention has: weights and a bias cut in tiles, norms not cut at all.
MODEL = (
    *("--group-query-attention", "--num-query-groups", "2"),
    *("--qk-layernorm", "--normalization", "RMSNorm"),
)
# Tied embeddings in a pipeline are a bucket of their own, whose padding Megatron's fully
# reshardable format mistakes for parameters, whatever the layout: in a small model it loses some.
UNTIED = "--untie-embeddings-and-output-weights"
FOR_EVERY_LAYOUT = "--dist-ckpt-optim-fully-reshardable"
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer", FOR_EVERY_LAYOUT, UNTIED)
OPTIMIZERS = {"whole": (), "distributed": DISTRIBUTED_OPTIMIZER}
LEARNABLE_OFFSET = ("--softmax-type", "learnable")

SP = "--sequence-parallel"
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "stock_tp4": (SP, "--tensor-model-parallel-size", "4"),
    "stock_tp4_without_sp": ("--tensor-model-parallel-size", "4"),
    "stock_tp2_pp2": (SP, "--tensor-model-parallel-size", "2", *PP2),
    # Also of other exchanges: a checkpoint knows nothing of them.
    "helix_2x2": (SP, "--helix-m", "2", "--helix-n", "2", "--helix-exchange", "weights"),
    "helix_4x1": (SP, "--helix-m", "4", "--helix-n", "1", "--helix-exchange", "activations"),
    "helix_2x1_dp2": (SP, "--helix-m", "2", "--helix-n", "1", "--helix-exchange", "scores"),
    "helix_2x1_pp2": (SP, "--helix-m", "2", "--helix-n", "1", *PP2),
}


def assert_goes_on(resumed: Curve, uninterrupted: Curve) -> None:
    """The steps after loading are the uninterrupted run's."""
    assert len(resumed.losses) == STEPS - SAVED_STEP
    losses, norms = uninterrupted.losses[SAVED_STEP:], uninterrupted.grad_norms[SAVED_STEP:]
    assert resumed.losses == pytest.approx(losses, rel=LOSS_TOLERANCE, abs=0)
    assert resumed.grad_norms == pytest.approx(norms, rel=GRAD_NORM_TOLERANCE, abs=0)


def tensors_in(checkpoint: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as Megatron puts it together on one rank."""
    folder = str(checkpoint / f"iter_{step:07d}")
    (content,) = run_distributed(lambda: load_plain_tensors(folder), 1)
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def passed_on(checkpoint: Path, folder: Path, flags: list[str], ranks: int) -> Path:
    """The checkpoint that a layout saves of what it loads, without a step."""
    saved = folder / "checkpoint"
    load = ("--load", str(checkpoint), "--ckpt-step", str(SAVED_STEP))
    save = ("--save", str(saved), "--save-interval", str(SAVED_STEP + 1))
    until = ("--train-iters", str(SAVED_STEP))
    # The end of its schedule is that of a run of no steps.
    flags = [*flags, *load, *save, *until, "--override-opt-param-scheduler"]
    argv = pretrain_gpt.prepare(flags, ranks)
    living_ranks().call(pretrain_gpt.train, argv, ranks=ranks)
    return saved


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """As they are, under the same names."""
    assert found.keys() == expected.keys()
    changed = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not changed

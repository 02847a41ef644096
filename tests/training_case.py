"""Several trainings by Megatron's own loop, one after the other on the same ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import training

from megatron_helix import pretrain_gpt
from megatron_helix.upstream import patches
from tests.distributed import TIMEOUT_S, Curve, living_ranks


@dataclass(kw_only=True)
class Trained(Curve):
    """What a rank has at the end of a training, beside what its steps said.

    Attributes:
        copied: parameters of which every rank of the tensor-parallel group has a copy.
        cut: the others.
        cuda_state: of CUDA's generator.
        tp, pp, dp: the rank's numbers.
    """

    copied: dict[str, torch.Tensor] = field(default_factory=dict)
    cut: dict[str, torch.Tensor] = field(default_factory=dict)
    cuda_state: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    tp: int = 0
    pp: int = 0
    dp: int = 0


def train(runs: Mapping[str, Sequence[str]], world_size: int) -> dict[str, list[Trained]]:
    """Train with each of these flags; by name of the run, what every rank has at its end."""
    trained = {}
    for name, flags in runs.items():
        argv = pretrain_gpt.prepare(list(flags), world_size)
        trained[name] = living_ranks().call(_train, argv, ranks=world_size, timeout_s=TIMEOUT_S)
    return trained


def _train(argv: list[str]) -> Trained:
    trained = Trained()
    patches.observe_train_step(partial(_observed, trained))
    pretrain_gpt.train(argv)
    trained.cuda_state = torch.cuda.get_rng_state()
    trained.tp = parallel_state.get_tensor_model_parallel_rank()
    trained.pp = parallel_state.get_pipeline_model_parallel_rank()
    trained.dp = parallel_state.get_data_parallel_rank()
    training.destroy_global_state()
    return trained


def _observed(trained: Trained, step: Any, *args: Any, **kwargs: Any) -> Any:
    result = step(*args, **kwargs)
    trained.note(result, optimizer=args[3])
    for chunk in args[2]:
        for name, weight in chunk.named_parameters():
            of_expert = not getattr(weight, "allreduce", True)
            is_cut = of_expert or getattr(weight, "tensor_model_parallel", False)
            (trained.cut if is_cut else trained.copied)[name] = weight.detach().clone()
    return result

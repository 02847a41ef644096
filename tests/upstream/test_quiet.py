"""What Megatron and torch say of themselves is kept back."""

import importlib
import warnings

import torch
import torch.distributed as dist
from megatron.core.models.mimo.config import base_configs

from megatron_helix.upstream import patches
from tests.distributed import run_distributed


def test_an_experiment_of_megatrons_is_not_ours_to_speak_of() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patches.quieten()
        importlib.reload(base_configs)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in told] == ["another"]


def _told() -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patches.quieten()
        mine = torch.ones(2)
        dist.all_gather_into_tensor(torch.empty(4), mine)
        dist.reduce_scatter_tensor(torch.empty(1), mine)
    return [str(one.message) for one in told]


def test_new_names_of_torch_are_not_the_users_to_use() -> None:
    assert run_distributed(_told, 2) == [[], []]

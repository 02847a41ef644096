"""Head and dim groups behave as the tensor-parallel group they are carved from."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_helix.partition import process_groups
from megatron_helix.partition.layout import HelixLayout
from tests.distributed import run_distributed


def timeout(group: dist.ProcessGroup) -> timedelta:
    """After which a collective of a group gives up."""
    return group._get_backend(group._device_types[0]).options._timeout


def timeouts(minutes: int) -> list[timedelta]:
    """Of the tensor-parallel, dim and head-axis group of a rank, with Megatron's flag."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=4, distributed_timeout_minutes=minutes
    )
    layout = HelixLayout(m=2, n=2, num_attention_heads=4, num_query_groups=4, kv_channels=16)
    groups = process_groups.carve(layout, parallel_state.get_tensor_model_parallel_group())
    return [timeout(group) for group in (groups.tp, groups.dim, groups.head)]


@pytest.mark.parametrize("minutes", [7, 90])
def test_groups_wait_as_long_as_megatrons(minutes: int) -> None:
    for found in run_distributed(timeouts, 4, minutes):
        assert found == [timedelta(minutes=minutes)] * 3

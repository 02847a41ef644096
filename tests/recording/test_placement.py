"""What a rank says of its weights: of one that Megatron FSDP or GTP cut, the whole."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tests.distributed import run_distributed

WHOLE = torch.arange(21.0).view(7, 3)
ROWS = ((0, 5), (5, 6), (6, 7))  # torch would take them for (0, 3), (3, 6), (6, 7)


def gathered() -> torch.Tensor:
    """The weight as a parameter of Megatron FSDP's, which is none of the CPU's, has it."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
        update_uneven_dtensor_chunk_metadata,
    )

    from megatron_helix.recording import placement

    begin, end = ROWS[dist.get_rank()]
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    spec = {"shape": WHOLE.shape, "stride": WHOLE.stride(), "run_check": False}
    sharded = DTensor.from_local(WHOLE[begin:end].clone(), mesh, [Shard(0)], **spec)
    update_uneven_dtensor_chunk_metadata(sharded)
    parameter: Any = torch.nn.Parameter(sharded)
    parameter.__fsdp_param__ = True
    return placement._whole(parameter).detach()


def test_a_weight_cut_unevenly_is_gathered_whole() -> None:
    for found in run_distributed(gathered, 3):
        assert torch.equal(found, WHOLE)


def shards_gathered() -> torch.Tensor:
    """The weight as GTP shards it, whose parameters need a GPU: rows, the last ones padded."""
    from megatron_helix.recording import placement

    padded = torch.cat([WHOLE, torch.full((2, 3), torch.nan)])
    parameter: Any = torch.nn.Parameter(padded.chunk(3)[dist.get_rank()].clone())
    parameter.is_gtp_weight_remat, parameter.group = True, dist.group.WORLD
    parameter.pad_length = 2
    return placement._whole(parameter).detach()


def test_shards_of_gtp_are_gathered_whole() -> None:
    for found in run_distributed(shards_gathered, 3):
        assert torch.equal(found, WHOLE)

"""What a rank really holds and where: read from live process groups and live parameters.

Nothing here is taken from a layout file. A rank says its device, its place in every process group,
the shape of every parameter, and a fingerprint of each attention weight it holds, by which
:mod:`megatron_helix.verification.verify` finds out which part of the model's weight that is. Of a
weight that FSDP or GTP shards the shape is that of the rank's shard, and the fingerprint that of
the whole, which is gathered for it: the shards of a group together are the tile. Megatron FSDP
shows the optimizer's weights in their place; what is said is said of those it computes with.
"""

import hashlib
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import to_local_if_dtensor
from torch.distributed.tensor import DTensor

from megatron_helix.upstream import cpu_device

ATTENTION_WEIGHTS = ("linear_qkv", "linear_proj")


@torch.no_grad()
def describe(model: list[torch.nn.Module]) -> dict[str, Any]:
    """This rank, with its chunks of the model, as JSON."""
    kept = {
        f"{chunk}.{name}": (to_local_if_dtensor(parameter).shape, _computed_in(parameter))
        for chunk, part in enumerate(model)
        for name, parameter in part.named_parameters()
    }
    return {
        "rank": dist.get_rank(),
        "device": _device(),
        "groups": _groups(),
        "parameters": {
            name: [list(shape), str(dtype).removeprefix("torch.")]
            for name, (shape, dtype) in kept.items()
        },
        "weight_bytes": sum(shape.numel() * dtype.itemsize for shape, dtype in kept.values()),
        "attention": [
            {
                "layer": layer,
                "weight": name,
                "shape": list(weight.shape),
                "dtype": str(_computed_in(weight)).removeprefix("torch."),
                "sha256": sha256(_whole(weight).to(_computed_in(weight))),
            }
            for layer, name, weight in _attention_weights(model)
        ],
    }


def _computed_in(parameter: torch.Tensor) -> torch.dtype:
    return getattr(parameter, "orig_param", parameter).dtype


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight without its shards: gathered from the ranks that have them, if there are any.

    Megatron FSDP, which marks its parameters, cuts its buffers where no even share ends: torch
    would take them for even, and ranks wait for each other's bytes. GTP's shards are rows, the last
    of them padded.
    """
    if getattr(weight, "is_gtp_weight_remat", False):
        return _rows_of_all(weight)
    if not isinstance(weight, DTensor):
        return weight
    if not getattr(weight, "__fsdp_param__", False):
        return weight.full_tensor()
    from megatron.core.distributed.fsdp.src.megatron_fsdp import uneven_dtensor

    return uneven_dtensor.uneven_dtensor_to_full_tensor(weight)


def _rows_of_all(weight: Any) -> torch.Tensor:
    """Of a shard of Megatron's generalized tensor parallelism: the whole, without padding."""
    ranks = dist.get_world_size(weight.group)
    whole = weight.new_empty(ranks * weight.size(0), weight.size(1))
    dist.all_gather_into_tensor(whole, weight.detach().contiguous(), group=weight.group)
    return whole[: whole.size(0) - weight.pad_length]


def sha256(weight: torch.Tensor) -> str:
    """Fingerprint of a tensor's values, as they lie in row-major order."""
    flat = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _device() -> dict[str, Any]:
    """Where this rank computes: a GPU, or on the CPU a process in its slot of the machine."""
    here = {"host": socket.gethostname(), "slot": int(os.environ.get("LOCAL_RANK", "0"))}
    if cpu_device.is_enabled():
        return {**here, "kind": "cpu", "id": f"process {os.getpid()}"}
    index = torch.cuda.current_device()
    return {**here, "slot": index, "kind": "cuda", "id": str(_uuid(index))}


def _uuid(index: int) -> Any:
    return torch.cuda.get_device_properties(index).uuid


def _groups() -> dict[str, list[int]]:
    """Global ranks of each group this rank is in, in the group's order."""
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
    }
    helix = getattr(parallel_state, "_HELIX_GROUPS", None)
    if helix is not None:
        groups |= {"dim": helix.dim, "head": helix.head}
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def _attention_weights(model: list[torch.nn.Module]) -> list[tuple[int, str, Any]]:
    """(layer of the whole model from 0, name, weight) of all attention weights of this rank."""
    layers: list[Any] = [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(module, TransformerLayer)
    ]
    return [
        (layer.layer_number - 1, name, getattr(layer.self_attention, name).weight)
        for layer in layers
        if isinstance(layer.self_attention, SelfAttention)
        for name in ATTENTION_WEIGHTS
    ]


class KeyValueBytes:
    """Counts the bytes of keys and values that this rank's core attention is given.

    The largest micro-batch of each layer, summed over layers: what a KV cache of that micro-batch
    would take on this rank.
    """

    def __init__(self, model: list[torch.nn.Module]):
        self.largest: dict[int, int] = {}
        attentions: list[Any] = [
            module
            for chunk in model
            for module in chunk.modules()
            if isinstance(module, SelfAttention)
        ]
        self._handles = [
            attention.core_attention.register_forward_pre_hook(self._see)
            for attention in attentions
        ]

    def _see(self, core_attention: torch.nn.Module, given: tuple[Any, ...]) -> None:
        _query, key, value = given[:3]
        seen = sum(tensor.numel() * tensor.element_size() for tensor in (key, value))
        self.largest[id(core_attention)] = max(seen, self.largest.get(id(core_attention), 0))

    def close(self) -> int:
        """Stop counting.

        Returns:
            The bytes.
        """
        for handle in self._handles:
            handle.remove()
        return sum(self.largest.values())

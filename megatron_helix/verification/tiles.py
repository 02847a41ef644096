"""What every tile should be: fingerprints of the checkpoint, cut as the layout says."""

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run


def fingerprints(
    experiment: ExperimentConfig, run: Run, checkpoint: Path, live: Sequence[dict[str, Any]]
) -> dict[tuple[int, int, str, str], str]:
    """SHA-256 of every tile of the checkpoint's attention weights.

    Returns:
        By (tensor rank, layer, weight, dtype), for the dtypes that ranks hold.
    """
    import torch

    from megatron_helix.partition.tiles import stored
    from megatron_helix.recording.placement import ATTENTION_WEIGHTS, sha256
    from megatron_helix.verification.expectation import deployment

    T = run.layout.tensor_parallel_size
    cut = deployment(experiment, run).cut if run.layout.is_helix else None
    dtypes = {weight["dtype"] for rank in live for weight in rank["attention"]}
    found = {}
    for name, axis in zip(ATTENTION_WEIGHTS, (0, 1), strict=True):
        whole = _read(checkpoint, f"decoder.layers.self_attention.{name}.weight")
        order = torch.arange(whole.size(1 + axis))
        if cut:
            order = cut.qkv_rows() if axis == 0 else cut.proj_columns()
        for layer, weight in enumerate(whole):
            for rank, part in enumerate(order.view(T, -1)):
                tile = stored(weight, part, axis)
                for dtype in dtypes:
                    found[rank, layer, name, dtype] = sha256(tile.to(getattr(torch, dtype)))
    return found


@cache
def _read(checkpoint: Path, name: str) -> Any:
    """One tensor of Megatron's distributed checkpoint, ``[layers, ...]``."""
    import torch
    from torch.distributed.checkpoint import filesystem, state_dict_loader

    step = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    folder = checkpoint / f"iter_{step:07d}"
    stored: Any = filesystem.FileSystemReader(folder).read_metadata().state_dict_metadata[name]
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load({name: tensor}, checkpoint_id=folder, no_dist=True)
    return tensor

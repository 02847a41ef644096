"""Weights of a checkpoint into a model that nothing has wrapped yet.

Megatron loads a checkpoint after data parallelism has wrapped the model, in the format of what
wraps it: Megatron FSDP reads only what it has saved itself, and of experts that torch FSDP2 has
sharded 0.19 takes no shard but the first rank's for an original. Before that every model describes
its tensors as canonical rows, so that one checkpoint in ``torch_dist`` format is the start of all.
"""

from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError


def require(folder: Path) -> Path:
    """The folder of the last step that is saved in ``folder``.

    Raises:
        UserError: when there is none in torch_dist format.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    last = tracker.read_text().strip() if tracker.exists() else ""
    step = folder / (f"iter_{int(last):07d}" if last.isdigit() else last or "iter")
    if not (step / "metadata.json").exists():
        raise UserError(
            "--helix-initial-weights: must be the folder of a checkpoint in torch_dist format, and"
            f" {folder} is not; save one with --save and --ckpt-format torch_dist"
        )
    return step


def load(folder: Path, model: list[Any]) -> list[Any]:
    """Fill the chunks of a model, which are returned; to be one of its ``pre_wrap_hooks``."""
    from megatron.core import dist_checkpointing

    step = require(folder)
    for chunk in model:
        wanted = {"model": chunk.sharded_state_dict()}
        chunk.load_state_dict(dist_checkpointing.load(wanted, str(step))["model"])
    return model

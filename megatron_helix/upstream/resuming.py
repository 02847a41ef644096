"""Whether a run may go on from a checkpoint with the schedule of learning rates that it asks for.

Megatron compares the schedules when every rank has loaded its weights, and fails by an assertion. A
larger ``--train-iters`` is another schedule, whatever its style: the weight decay's ends with it.
"""

import argparse
import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_helix.basics.errors import UserError

# Of a schedule, what parameter groups are told apart by when they are loaded.
_OF_GROUPS = ("max_lr", "min_lr")


def require_schedule(args: argparse.Namespace, checkpoint: Path | None, world_size: int) -> None:
    """Refuse a schedule that Megatron would refuse.

    Args:
        args: as Megatron's parser reads them, before its validation.
        checkpoint: that ``--load`` will find; None, or none in torch_dist format: nothing is asked.
        world_size: ranks of the run.

    Raises:
        UserError: naming what differs, and the flags that say which of the two holds.
    """
    goes_on = not (args.finetune or args.no_load_optim or args.skip_train)
    settled = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if not checkpoint or not goes_on or settled or checkpoint.name == "release":
        return
    if args.global_batch_size is None and (
        args.use_checkpoint_args or args.step_batch_size_schedule
    ):
        return  # only the ranks will know it
    saved = _saved(checkpoint)
    if saved is None:
        return
    try:
        ours = _schedule(args, world_size)
    except Exception:  # whatever it is, it comes again in Megatron's validation
        return
    asked = ours.state_dict()
    try:
        ours.load_state_dict(saved)
    except AssertionError:
        differ = [
            f"{name} {value}, there {saved[name]}"
            for name, value in asked.items()
            if name != "num_steps" and saved.get(name, value) != value
        ]
        said = (
            f"the schedule of learning rates in {checkpoint} is another than the flags'"
            f" ({', '.join(differ)})"
        )
        if any(asked[name] != saved.get(name) for name in _OF_GROUPS):
            raise UserError(
                f"--load: {said}; give the checkpoint's --lr and --min-lr, by which Megatron finds"
                " the optimizer's states, or leave these behind with --no-load-optim"
            ) from None
        raise UserError(
            f"--load: {said}; add --override-opt-param-scheduler to go on with that of the flags,"
            " or --use-checkpoint-opt-param-scheduler with the checkpoint's"
        ) from None


def _saved(checkpoint: Path) -> dict[str, Any] | None:
    """The state of the schedule that a checkpoint in torch_dist format has kept."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    if not (checkpoint / "metadata.json").is_file():
        return None
    with warnings.catch_warnings():  # torch.distributed is disabled here, as it should be
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state = load_common_state_dict(str(checkpoint))
    if getattr(state.get("args"), "no_save_optim", False):
        return None
    return state.get("lr_scheduler") or state.get("opt_param_scheduler")


def _schedule(args: argparse.Namespace, world_size: int) -> Any:
    """Megatron's own schedule, of arguments that only lack what its validation fills in."""
    from megatron.training import training

    args = copy.copy(args)
    if args.global_batch_size is None:
        shared = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        replicas = world_size // (shared * args.context_parallel_size)
        args.global_batch_size = args.micro_batch_size * replicas
    if args.weight_decay_incr_style == "constant":
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
    asked = training.get_args
    training.get_args = lambda: args
    try:
        return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:
        training.get_args = asked

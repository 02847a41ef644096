"""One JSON line a step and rank: loss, gradient norm, time, and what the collectives moved.

Megatron's loop stays unmodified; :func:`record` stands around its ``train_step``. The lines of a
rank go to ``rank00.jsonl`` and so on in one folder, each as soon as its step is over, so that a run
that dies keeps what it measured; a restart writes on behind it
(:mod:`megatron_helix.recording.rank_files`). Beside them ``rank00.json`` says what the rank holds
and where (:mod:`megatron_helix.recording.placement`). :func:`metrics.read` puts the ranks together.

On CPUs the first step, which no time is taken from, counts FLOPs. Not on a GPU: whatever Megatron
compiles (SwiGLU, say) would stay uncompiled for the whole run, and GEMMs of TransformerEngine would
not be among them. With ``profile`` the last step runs under torch's profiler
(:mod:`megatron_helix.recording.profile`).
"""

import json
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args
from torch.utils.flop_counter import FlopCounterMode

from megatron_helix.basics import files
from megatron_helix.recording import placement, profile, rank_files
from megatron_helix.recording.clocks import Call, HostClock, StreamClock
from megatron_helix.recording.comm_ledger import CommLedger, install, totals
from megatron_helix.recording.kinds import POINT_TO_POINT
from megatron_helix.upstream import cpu_device, patches

Phase = Literal["train", "prefill"]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to write, and how.

    Attributes:
        folder: where the ranks' files go; made if missing.
        rank: this rank.
        ranks: of the run.
        sequence: tokens of a sequence.
        phase: ``prefill`` runs the forward pass alone where the loop trains.
        profile: whether the last step runs under a profiler.
    """

    folder: Path
    rank: int
    ranks: int
    sequence: int
    phase: Phase = "train"
    profile: bool = False


def record(recording: Recording) -> None:
    """From now on write a line for every training step of this rank.

    Raises:
        UserError: where another run writes into the folder.
    """
    file = rank_files.append(recording.folder, recording.rank)
    on_gpu = torch.cuda.is_available() and not cpu_device.is_enabled()
    ledger = CommLedger(StreamClock() if on_gpu else HostClock())
    install(ledger)
    first = True

    def observed(train_step: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        nonlocal first
        if recording.phase == "prefill":
            train_step = forward_only
        model, optimizer = args[2], args[3]
        described = placement.describe(model) if first else {}
        key_values = placement.KeyValueBytes(model) if first else None
        flops = flop_counter(on_gpu) if first else None
        profiled = recording.profile and iteration + 1 == get_args().train_iters
        profiler = profile.profiler(on_gpu) if profiled else None
        ledger.take()  # what happened between steps is not part of one
        start, busy = time.perf_counter(), time.thread_time()
        for context in filter(None, (flops, profiler)):
            context.__enter__()
        result = train_step(*args, iteration=iteration, **kwargs)
        for context in filter(None, (profiler, flops)):
            context.__exit__(None, None, None)
        calls = ledger.take_calls()  # waits for the GPU
        step_s, busy = time.perf_counter() - start, time.thread_time() - busy
        line = {
            "iteration": iteration + 1,
            "first": first,
            **_line(recording, calls, step_s, result),
            "busy_s": step_s - sum(call.time_s for call in calls) if on_gpu else busy,
            "loss_scale": loss_scale(optimizer),
            "peak_memory_bytes": _peak_memory_bytes(on_gpu),
        }
        if flops:
            line["flops"] = flops.get_total_flops()
        if key_values:
            described["key_value_bytes"] = key_values.close()
            described_in = files.of_rank(recording.folder, recording.rank, ".json")
            files.write(described_in, json.dumps(described))
        if profiler:
            events = profiler.profiler.kineto_results.events()
            line["profile"] = profile.times(events, calls)
        file.write(json.dumps(line) + "\n")
        file.flush()
        first = False
        return result

    patches.observe_train_step(observed)


def flop_counter(on_gpu: bool) -> FlopCounterMode | None:
    """What counts a step's FLOPs; nothing on a GPU.

    Torch runs uncompiled, there and ever after, what is first called while a counter watches
    (torch._dynamo.convert_frame, 2.13): SwiGLU and its gradient made a step of Qwen2.5-7B's layers
    take a tenth longer.
    """
    return None if on_gpu else _FlopCounter()


class _FlopCounter(FlopCounterMode):
    """Torch's counter without its counts per module, whose hooks fail under full recompute.

    Under it a layer runs with gradients on and inputs that have none; the tracker of modules wants
    the gradient function of every input (torch.utils.module_tracker, 2.11 and 2.13).
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _OneModule()


class _OneModule(AbstractContextManager):
    parents = frozenset({"Global"})

    def __exit__(self, *_error: object) -> None:
        return None


def forward_only(
    forward_step_func: Any, data_iterator: Any, model: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Prefill, in the place and with the signature of Megatron's ``train_step``.

    The forward passes of all micro-batches through Megatron's own schedule, without gradients and
    without an update. The loss shows that layouts agree; nothing else is communicated for it.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.parallel_state import get_data_parallel_group
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    _optimizer, _scheduler, _config, forward_backward_func, *_ = args
    flags = get_args()
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)  # as in Megatron's own evaluation
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        reports = forward_backward_func(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=flags.seq_length,
            micro_batch_size=flags.micro_batch_size,
            decoder_seq_length=flags.decoder_seq_length,
            forward_only=True,
        )
    losses = {}
    if reports:
        summed = torch.stack([report["lm loss"].view(-1) for report in reports]).sum(dim=0)
        torch.distributed.all_reduce(
            summed, group=get_data_parallel_group(with_context_parallel=True)
        )
        losses = {"lm loss": summed[0] / summed[1]}
    return losses, 0, False, False, 0, None, None, 0


def _line(recording: Recording, calls: list[Call], step_s: float, result: Any) -> dict[str, Any]:
    losses, skipped, *_, grad_norm, _zeros, _logit = result
    batch = get_current_global_batch_size()  # it may grow from step to step
    return {
        "ranks": recording.ranks,
        "step_s": step_s,
        "communication_s": sum(call.time_s for call in calls),
        "batch": batch,
        "tokens": batch * recording.sequence,
        "loss": float(losses["lm loss"]) if "lm loss" in losses else None,
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "skipped": bool(skipped),
        "traffic": [
            {"axis": axis, "kind": kind, **vars(entry)}
            for (axis, kind), entry in sorted(totals(calls).items())
        ],
        "calls": [
            (call.channel, call.number, call.kind, round(call.time_s, 7))
            for call in calls
            if call.sent_bytes or call.kind in POINT_TO_POINT
        ],
    }


def loss_scale(optimizer: Any) -> float | None:
    """The loss scale after the step; None where nothing is scaled."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    scalers = [getattr(part, "grad_scaler", None) for part in parts]
    return next((float(scaler.scale) for scaler in scalers if scaler), None)


def _peak_memory_bytes(on_gpu: bool) -> int:
    """Most memory this rank has held: of the GPU's allocator, or resident of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

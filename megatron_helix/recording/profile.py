"""A step under torch's profiler: the time of its collectives, independent of the ledger's.

On a GPU the profiler sees when kernels run. A collective's kernel is *exposed* while nothing else
runs on the GPU, and *hidden* while something does. What the ledger counts is the exposed part.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_helix.recording.clocks import Call
from megatron_helix.recording.kinds import POINT_TO_POINT

Interval = tuple[int, int]


def profiler(on_gpu: bool) -> Any:
    """A context that watches what runs in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def times(events: Iterable[Any], calls: Sequence[Call]) -> dict[str, float]:
    """Seconds of a step's collectives, by the profiler and by the ledger.

    On the CPU, sends and receives are left out: the profiler counts how long they are under way,
    the ledger how long the rank is held up by them. On a GPU they cannot be: NCCL makes an
    all-to-all of them. What is exposed there is the same by both.

    Args:
        events: of Kineto, of one step.
        calls: of the ledger, in the same step.

    Returns:
        ``profiler_s``, the sum of all collectives; ``exposed_s`` and ``hidden_s``, the time in
        which any runs, without and with other work; ``ledger_s``; on a GPU ``computed_s``, the time
        in which its kernels but collectives run.
    """
    events = list(events)
    kernels = [event for event in events if _on_gpu(event) and not event.is_user_annotation()]
    nccl = [kernel for kernel in kernels if kernel.name().startswith("nccl")]
    others = [_span(kernel) for kernel in kernels if not kernel.name().startswith("nccl")]
    if nccl:
        total = sum(kernel.duration_ns() for kernel in nccl)
        exposed, hidden = overlap([*map(_span, nccl)], others)
        held_up = sum(call.time_s for call in calls)
    else:
        gloo = [
            event
            for event in events
            if event.name().startswith("gloo:")
            and not any(word in event.name().lower() for word in POINT_TO_POINT)
        ]
        total = exposed = sum(event.duration_ns() for event in gloo)
        hidden = 0
        held_up = sum(call.time_s for call in calls if call.kind not in POINT_TO_POINT)
    return {
        "profiler_s": total / 1e9,
        "exposed_s": exposed / 1e9,
        "hidden_s": hidden / 1e9,
        "ledger_s": held_up,
        **({"computed_s": overlap(others, [])[0] / 1e9} if kernels else {}),
    }


def overlap(collectives: Sequence[Interval], others: Sequence[Interval]) -> tuple[int, int]:
    """How long any collective runs without other work, and how long beside it."""
    edges = sorted(
        (moment, which, change)
        for which, spans in enumerate((collectives, others))
        for start, end in spans
        for moment, change in ((start, 1), (end, -1))
    )
    running, spent, before = [0, 0], [0, 0], 0
    for moment, which, change in edges:
        if running[0]:
            spent[bool(running[1])] += moment - before
        running[which] += change
        before = moment
    return spent[0], spent[1]


def _on_gpu(event: Any) -> bool:
    return event.device_type().name == "CUDA"


def _span(event: Any) -> Interval:
    return event.start_ns(), event.start_ns() + event.duration_ns()

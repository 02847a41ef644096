"""What the lines of a run's ranks say, put together: TPS, TPOT, where the time went, per rank.

:mod:`megatron_helix.recording.record` writes the lines; times come from the steps that are neither
the first ones, which warm up, nor watched by a profiler.

A step's time has four parts. Outside collectives a rank *computes*. The shortest time of a call
over its ranks is *communication*: the rank that came last did not wait. What a rank spends above it
is *waiting* for slower ranks; between pipeline stages (sends and receives) it is *pipeline idle*.
"""

import json
import os
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.recording.kinds import POINT_TO_POINT
from megatron_helix.recording.percentiles import p99

TAIL_BYTES = 1 << 20  # holds the last line of a rank, whatever it sent in the step

PARTS = ("compute", "communication", "waiting", "pipeline_idle")

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What the ranks of one run measured. Times are those of the steps that count.

    Attributes:
        losses: of every step.
        grad_norms: of every step; None where the phase has no backward pass.
        step_ms: duration of a step on its slowest rank, median.
        step_ms_spread: the shortest and the longest one.
        tokens_per_s: TPS, tokens of a step over its median duration.
        tpot_ms: communication and waiting time of a rank, mean over ranks, for every ``batch``
            tokens; median over steps.
        tpot_mean_ms: the same, mean over steps.
        tpot_p99_ms: the same, 99th percentile over steps; None of fewer than 20.
        tpot_slowest_rank_ms: of the rank with most of it, median over steps.
        breakdown_ms: the parts of a step (:data:`PARTS`), means over ranks, each the median over
            steps.
        hidden_ms: communication beside which a rank computed, mean over ranks, in the profiled
            step; None without one.
        computed_ms: a GPU's kernels but collectives, mean over ranks, in the profiled step; None
            without one.
        peak_memory_bytes: most that a rank has held: of a GPU's allocator, or resident of the
            process, which counts what forked ranks share.
        weight_bytes: of the weights that the rank with most of them holds.
        sent_bytes: by axis and kind, sent by one rank in one step; mean over ranks.
        loss_scales: of every step; None without loss scaling.
        skipped_steps: updates that overflowed and were left out.
        per_rank: one mapping a rank: ``sent_bytes``, ``kept_bytes`` (of all-to-alls, for itself)
            and ``calls`` by axis and kind, ``busy_s``, ``flops``, ``peak_memory_bytes`` and the
            ``profile`` of the profiled step.
    """

    losses: list[float]
    grad_norms: list[float | None]
    step_ms: float
    step_ms_spread: tuple[float, float]
    tokens_per_s: float
    tpot_ms: float
    tpot_mean_ms: float
    tpot_p99_ms: float | None
    tpot_slowest_rank_ms: float
    breakdown_ms: dict[str, float]
    hidden_ms: float | None
    computed_ms: float | None
    peak_memory_bytes: int
    weight_bytes: int
    sent_bytes: dict[str, float]
    loss_scales: list[float | None]
    skipped_steps: int
    per_rank: list[dict[str, Any]]


def steps_done(folder: Path) -> int:
    """The last step that every rank of a run has finished so far; 0 before the first one."""
    return min(map(_last_step, files.of_ranks(folder, ".jsonl")), default=0)


def _last_step(file: Path) -> int:
    """The step of the last line that is whole.

    Asked often, beside ranks that compute: only the file's end is read, and no JSON parsed.
    """
    with file.open("rb") as lines:
        lines.seek(-min(lines.seek(0, os.SEEK_END), TAIL_BYTES), os.SEEK_END)
        whole = lines.read().rpartition(b"\n")[0]
    said = re.match(rb'\{"iteration": (\d+)', whole.rpartition(b"\n")[2])
    return int(said[1]) if said else 0


def read(folder: Path) -> RunMetrics:
    """Put together what the ranks of a finished run wrote.

    Raises:
        UserError: when there is nothing, or the ranks disagree on the number of steps.
    """
    ranks = [_steps(file) for file in files.of_ranks(folder, ".jsonl")]
    ranks = ranks[: ranks[0][-1]["ranks"]] if ranks and ranks[0] else ranks
    counts = {len(lines) for lines in ranks}
    if len(counts) != 1 or counts == {0}:
        raise UserError(f"{folder}: need the same number of steps of every rank, got {counts}")
    steps = list(zip(*ranks, strict=True))
    counted = _counted(steps)
    step_ms = [max(line["step_s"] for line in step) * 1e3 for step in counted]
    tokens, batch = counted[-1][0]["tokens"], counted[-1][0]["batch"]
    per_batch_ms = 1e3 * batch / tokens
    tpot = [statistics.mean(_communication(step)) * per_batch_ms for step in counted]
    slowest = max(map(statistics.median, zip(*map(_communication, counted), strict=True)))
    profiles = [line["profile"] for lines in ranks for line in lines if "profile" in line]
    return RunMetrics(
        losses=[_said(step, "loss") for step in steps],
        grad_norms=[_said(step, "grad_norm") for step in steps],
        step_ms=statistics.median(step_ms),
        step_ms_spread=(min(step_ms), max(step_ms)),
        tokens_per_s=tokens / statistics.median(step_ms) * 1e3,
        tpot_ms=statistics.median(tpot),
        tpot_mean_ms=statistics.mean(tpot),
        tpot_p99_ms=p99(tpot),
        tpot_slowest_rank_ms=slowest * per_batch_ms,
        breakdown_ms=_breakdown(counted),
        hidden_ms=_mean_ms(profiles, "hidden_s"),
        computed_ms=_mean_ms(profiles, "computed_s"),
        peak_memory_bytes=max(lines[-1].get("peak_memory_bytes", 0) for lines in ranks),
        weight_bytes=max(
            (json.loads(f.read_text())["weight_bytes"] for f in files.of_ranks(folder, ".json")),
            default=0,
        ),
        sent_bytes=_mean_of([_sent(line) for line in counted[-1]]),
        loss_scales=[_said(step, "loss_scale") for step in steps],
        skipped_steps=sum(any(line["skipped"] for line in step) for step in steps),
        per_rank=[_rank(lines, line) for lines, line in zip(ranks, counted[-1], strict=True)],
    )


def _mean_ms(profiles: list[dict[str, float]], key: str) -> float | None:
    found = [profile[key] for profile in profiles if key in profile]
    return statistics.mean(found) * 1e3 if found else None


def _steps(file: Path) -> list[Line]:
    """The lines of a rank, one a step.

    A restart goes on after its checkpoint: what a run that died measured beyond that is done again,
    and counts as it was done last. A line without its end is one that is being written, or was when
    its run died.
    """
    steps: dict[int, Line] = {}
    for text in file.read_text().rpartition("\n")[0].splitlines():
        line = json.loads(text)
        if line["first"]:
            steps = {done: kept for done, kept in steps.items() if done < line["iteration"]}
        steps[line["iteration"]] = line
    return list(steps.values())


def _counted(steps: list[tuple[Line, ...]]) -> list[tuple[Line, ...]]:
    """The steps whose times count; all of them where none would be left.

    The first one after a start does not: it has allocations and first connections in it.
    """
    warm = [step for step in steps if not step[0]["first"]]
    return [step for step in warm if not step[0].get("profile")] or warm or steps


def _communication(step: tuple[Line, ...]) -> list[float]:
    return [line["communication_s"] for line in step]


def _breakdown(counted: list[tuple[Line, ...]]) -> dict[str, float]:
    """Milliseconds of each part, medians over steps as the durations of these are."""
    steps = [_parts(step) for step in counted]
    return {part: statistics.median(step[part] for step in steps) * 1e3 for part in PARTS}


def _parts(step: tuple[Line, ...]) -> dict[str, float]:
    """Seconds of each part of a step, means over ranks."""
    shortest: dict[tuple[str, int], float] = {}
    for line in step:
        for channel, number, _, seconds in line.get("calls", ()):
            call = channel, number
            shortest[call] = min(seconds, shortest.get(call, seconds))
    sums = dict.fromkeys(PARTS, 0.0)
    for line in step:
        sums["compute"] += line["step_s"] - line["communication_s"]
        for channel, number, kind, seconds in line.get("calls", ()):
            waited = seconds - shortest[channel, number]
            sums["communication"] += seconds - waited
            sums["pipeline_idle" if kind in POINT_TO_POINT else "waiting"] += waited
    return {part: seconds / len(step) for part, seconds in sums.items()}


def _sent(line: Line) -> dict[str, float]:
    return {f"{entry['axis']}/{entry['kind']}": entry["sent_bytes"] for entry in line["traffic"]}


def _mean_of(ranks: list[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for key, value in rank.items():
            sums[key] += value / len(ranks)
    return dict(sums)


def _rank(lines: list[Line], counted: Line) -> dict[str, Any]:
    """What one rank measured."""
    own = [step[0] for step in _counted([(line,) for line in lines])]
    return {
        "sent_bytes": _sent(counted),
        "kept_bytes": {f"{e['axis']}/{e['kind']}": e["kept_bytes"] for e in counted["traffic"]},
        "calls": {f"{e['axis']}/{e['kind']}": e["calls"] for e in counted["traffic"]},
        "busy_s": statistics.median(line.get("busy_s", 0.0) for line in own),
        "flops": next((line["flops"] for line in lines if line.get("flops")), None),
        "peak_memory_bytes": lines[-1].get("peak_memory_bytes"),
        "profile": next((line["profile"] for line in lines if line.get("profile")), None),
    }


def _said(step: tuple[Line, ...], key: str) -> Any:
    """A value that only some ranks know (the loss: those of the last pipeline stage)."""
    return next((line[key] for line in reversed(step) if line.get(key) is not None), None)

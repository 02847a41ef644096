"""One JSON line a step and rank: loss, gradient norm, time, and what the collectives moved.

Megatron's loop stays unmodified; :func:`record` stands around its ``train_step``. The lines of a
rank go to ``rank00.jsonl`` and so on in one folder, each as soon as its step is over, so that a run
that dies keeps what it measured. :func:`read` puts the ranks together.
"""

import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_helix.experiment.comm_ledger import CommLedger, install

WARMUP_STEPS = 1  # not counted in a median: allocations and gloo's first connections


def record(folder: Path, rank: int, *, batch: int, sequence: int) -> None:
    """From now on write a line for every training step of this rank.

    Args:
        folder: where the ranks' files go; made if missing.
        rank: this rank.
        batch: sequences of a global batch.
        sequence: tokens of a sequence.
    """
    from megatron_helix import compat

    folder.mkdir(parents=True, exist_ok=True)
    ledger = CommLedger()
    install(ledger)
    file = (folder / f"rank{rank:02d}.jsonl").open("w")

    def observed(train_step: Any, *args: Any, **kwargs: Any) -> Any:
        ledger.take()  # what happened between steps is not part of one
        start = time.perf_counter()
        result = train_step(*args, **kwargs)
        step_s = time.perf_counter() - start
        losses, skipped, *_, grad_norm, _zeros, _logit = result
        traffic = ledger.take()
        line = {
            "step_s": step_s,
            "communication_s": sum(entry.time_s for entry in traffic.values()),
            "batch": batch,
            "tokens": batch * sequence,
            "loss": float(losses["lm loss"]) if "lm loss" in losses else None,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": bool(skipped),
            "traffic": [
                {"axis": axis, "kind": kind, **vars(entry)}
                for (axis, kind), entry in sorted(traffic.items())
            ],
        }
        file.write(json.dumps(line) + "\n")
        file.flush()
        return result

    compat.observe_train_step(observed)


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What the ranks of one run measured. Times are medians over the steps after warm-up.

    Attributes:
        losses: of every step.
        grad_norms: of every step.
        step_ms: duration of a step on its slowest rank.
        tokens_per_s: TPS, tokens of a step over its duration.
        tpot_ms: communication and waiting time of a rank, mean over ranks, for every ``batch``
        tokens.
        sent_bytes: by axis and kind, sent by one rank in one step; mean over ranks.
    """

    losses: list[float]
    grad_norms: list[float]
    step_ms: float
    tokens_per_s: float
    tpot_ms: float
    sent_bytes: dict[str, float]


def steps_done(folder: Path) -> int:
    """Steps that every rank of a run has finished so far."""
    files = list(folder.glob("rank*.jsonl"))
    return min((file.read_text().count("\n") for file in files), default=0)


def read(folder: Path) -> RunMetrics:
    """Put together what the ranks of a finished run wrote.

    Raises:
        ValueError: when there is nothing, or the ranks disagree on the number of steps.
    """
    ranks = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(folder.glob("rank*.jsonl"))
    ]
    counts = {len(lines) for lines in ranks}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"{folder}: need the same number of steps of every rank, got {counts}")
    steps = list(zip(*ranks, strict=True))
    counted = steps[WARMUP_STEPS:] or steps
    step_s = statistics.median(max(line["step_s"] for line in step) for step in counted)
    communication_s = statistics.median(
        statistics.mean(line["communication_s"] for line in step) for step in counted
    )
    tokens, batch = steps[0][0]["tokens"], steps[0][0]["batch"]
    sent: dict[str, float] = defaultdict(float)
    for line in counted[-1]:
        for entry in line["traffic"]:
            sent[f"{entry['axis']}/{entry['kind']}"] += entry["sent_bytes"] / len(ranks)
    return RunMetrics(
        losses=[_said(step, "loss") for step in steps],
        grad_norms=[_said(step, "grad_norm") for step in steps],
        step_ms=step_s * 1e3,
        tokens_per_s=tokens / step_s,
        tpot_ms=communication_s * batch / tokens * 1e3,
        sent_bytes=dict(sent),
    )


def _said(step: tuple[dict[str, Any], ...], key: str) -> float:
    """A value that only some ranks know (the loss: those of the last pipeline stage)."""
    return next(line[key] for line in reversed(step) if line[key] is not None)

"""What generation costs: latencies as a client sees them, and what a decode step sends.

Each rank writes one JSON file; :func:`read` puts them together. Definitions:

* **TTFT**: from the start of the prefill to a sequence's first new token, mean over sequences.
* **inter-token latency**: between two tokens of a sequence; mean, median and 99th percentile.
* **TPS**: tokens generated in decode steps per second, all sequences together.
* **TPOT**: communication and waiting time of a rank, mean over ranks, per decode step, in which
  every sequence of the batch gets one token.

Times are the first rank's, which has every token when a client would. A request before the measured
one takes the cost of first connections and allocations on itself.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.recording.clocks import HostClock, StreamClock
from megatron_helix.recording.comm_ledger import CommLedger, install
from megatron_helix.recording.percentiles import p99

if TYPE_CHECKING:  # it imports Megatron, which a process that only reads does without
    from megatron_helix.inference.engine import Engine, MicroBatch

# What a rank's two phases leave in its file.
_Times = list[list[float]]


@dataclass(frozen=True, kw_only=True)
class DecodeMetrics:
    """What the ranks of one run measured.

    Attributes:
        batch: sequences.
        decode_steps: measured.
        ttft_ms: time to first token.
        itl_ms: inter-token latency, mean.
        itl_p50_ms: its median.
        itl_p99_ms: its 99th percentile; None of fewer than 20 times.
        tpot_ms: communication and waiting per decode step.
        tokens_per_s: in decode steps.
        kv_bytes: keys and values each rank holds, in rank order.
        sent_bytes: by axis and kind, of one rank in one decode step; mean over ranks.
        kept_bytes: the same of what all-to-alls had for the rank itself.
        prefill_sent_bytes: ``sent_bytes`` of the prefill.
    """

    batch: int
    decode_steps: int
    ttft_ms: float
    itl_ms: float
    itl_p50_ms: float
    itl_p99_ms: float | None
    tpot_ms: float
    tokens_per_s: float
    kv_bytes: list[int]
    sent_bytes: dict[str, float]
    kept_bytes: dict[str, float]
    prefill_sent_bytes: dict[str, float]


def record(
    engine: Engine, make_parts: Callable[[], list[MicroBatch]], folder: Path, rank: int
) -> None:
    """Serve one request to warm up and one to measure, and write this rank's file to ``folder``.

    Args:
        engine: of this rank's stage.
        make_parts: the request, anew: prompts of one length, and two new tokens or more.
        folder: where the ranks' files go; made if missing.
        rank: this rank.
    """
    from megatron_helix.inference.engine import cache_bytes

    warm = make_parts()
    for _ in (*engine.prefill(warm), *engine.decode(warm)):
        pass
    del warm
    parts = make_parts()
    on_gpu = parts[0].tokens.device.type == "cuda"
    ledger = CommLedger(StreamClock() if on_gpu else HostClock())
    uninstall = install(ledger)
    start = time.perf_counter()
    times: _Times = [[] for _ in parts]
    traffic = []
    try:
        for phase in (engine.prefill, engine.decode):
            for step in phase(parts):
                times[step.microbatch].append(step.time_s - start)
            traffic.append(ledger.take())
    finally:
        uninstall()
    prefill, decode = traffic
    line = {
        "batch": sum(len(part.tokens) for part in parts),
        "times_s": times,
        "communication_s": sum(entry.time_s for entry in decode.values()),
        "kv_bytes": cache_bytes(parts),
        "sent_bytes": _sent(decode),
        "kept_bytes": {f"{a}/{kind}": t.kept_bytes for (a, kind), t in decode.items()},
        "prefill_sent_bytes": _sent(prefill),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(files.of_rank(folder, rank, ".json"), json.dumps(line))


def _sent(entries: Any) -> dict[str, int]:
    return {f"{axis}/{kind}": entry.sent_bytes for (axis, kind), entry in entries.items()}


def read(folder: Path) -> DecodeMetrics:
    """Put together what the ranks of a finished run wrote.

    Raises:
        UserError: when there is nothing.
    """
    remedy = "remove the folder, and measure once more"
    ranks = [files.read_json(file, remedy) for file in files.of_ranks(folder, ".json")]
    if not ranks:
        raise UserError(f"{folder}: need the files of a finished measurement, found none")
    times: _Times = ranks[0]["times_s"]
    steps = len(times[0]) - 1
    latencies = [b - a for part in times for a, b in pairwise(part)]
    batch = ranks[0]["batch"]
    decode_s = max(part[-1] for part in times) - max(part[0] for part in times)
    longest = p99(latencies)
    return DecodeMetrics(
        batch=batch,
        decode_steps=steps,
        ttft_ms=statistics.mean(part[0] for part in times) * 1e3,
        itl_ms=statistics.mean(latencies) * 1e3,
        itl_p50_ms=statistics.median(latencies) * 1e3,
        itl_p99_ms=None if longest is None else longest * 1e3,
        tpot_ms=statistics.mean(rank["communication_s"] for rank in ranks) / steps * 1e3,
        tokens_per_s=batch * steps / decode_s,
        kv_bytes=[rank["kv_bytes"] for rank in ranks],
        sent_bytes=_mean_of(ranks, "sent_bytes", steps),
        kept_bytes=_mean_of(ranks, "kept_bytes", steps),
        prefill_sent_bytes=_mean_of(ranks, "prefill_sent_bytes", 1),
    )


def _mean_of(ranks: list[dict[str, Any]], name: str, steps: int) -> dict[str, float]:
    keys = sorted({key for rank in ranks for key in rank[name]})
    return {key: sum(rank[name].get(key, 0) for rank in ranks) / len(ranks) / steps for key in keys}

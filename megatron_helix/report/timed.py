"""Tables of what the clocks of a device say.

Headings and cells, formatted. Figures are measured, predicted or claimed; each table says which in
its heading, and none stands in another's column.
"""

from collections.abc import Sequence
from typing import Any

from megatron_helix.experiment import decode
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.metrics import PARTS
from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    change,
    decoded,
    if_known,
    significant,
    trained,
)
from megatron_helix.recording.percentiles import FEWEST
from megatron_helix.report import prediction

Page = dict[str, Any]


def tables(experiment: ExperimentConfig, results: Sequence[Result]) -> list[Page]:
    """What the clocks of the device say."""
    loops, requests = trained(results), decoded(results)
    return [
        _source_table(experiment, results),
        *([_time_table(loops), _rate_table(loops)] if loops else []),
        *([_decode_table(experiment, requests)] if requests else []),
    ]


def _source_table(experiment: ExperimentConfig, results: Sequence[Result]) -> Page:
    """TPS and TPOT of every run, and beside them what is claimed and what was predicted."""
    claims = {(claim.model, claim.layout, claim.phase): claim for claim in experiment.claims}
    machine = experiment.hardware
    heads = ["model", "layout", "phase"]
    for figure in ("TPS", "TPOT ms"):
        heads += [f"{figure}, claimed"] if claims else []
        heads += [f"{figure}, predicted"] if machine else []
        heads.append(f"{figure}, measured")
        heads += ["prediction's error"] if machine else []
    rows = []
    for result in results:
        base = baseline_of(result, results)
        claimed, first = (
            claims.get((one["model"], one["layout"], one["phase"])) for one in (result, base)
        )
        row = [result["model"], result["layout"], result["phase"]]
        for key in ("tokens_per_s", "tpot_ms"):
            if claims:
                row.append(
                    _claimed(getattr(claimed, key), getattr(first or claimed, key))
                    if claimed
                    else "-"
                )
            if machine:
                row.append(_beside(result["predicted"][key], base["predicted"][key]))
            row.append(_beside(result[key], base[key]))
            if machine:
                row.append(f"{prediction.error(result, key):+.0%}")
        rows.append(row)
    note = "In brackets: against the first layout."
    if machine:
        late = prediction.of_late_hosts(results)
        note = f"Predicted for {machine.name}.{late} {note}"
    if claims:
        of = "; ".join(sorted({claim.of for claim in experiment.claims}))
        note = f"Claimed figures are those of {of}. {note}"
    return {"title": "Throughput and overhead", "note": note, "heads": heads, "rows": rows}


def _beside(value: float, baseline: float) -> str:
    return f"{significant(value)}{change(value, baseline)}"


def _claimed(value: float, baseline: float) -> str:
    """With the digits that were claimed."""
    return f"{value:,.12g}{change(value, baseline)}"


def _time_table(results: Sequence[Result]) -> Page:
    rows = []
    for result in results:
        low, high = result["step_ms_spread"]
        rows.append(
            [
                result["name"],
                f"{result['step_ms']:,.1f} ({low:,.1f} to {high:,.1f})",
                *(f"{milliseconds:,.1f}" for milliseconds in result["breakdown_ms"].values()),
                "-" if result["hidden_ms"] is None else f"{result['hidden_ms']:,.1f}",
            ]
        )
    return {
        "title": "Where a step's time goes",
        "note": "Measured, ms. Step: slowest rank, median (shortest to longest) of the steps after"
        " the first. Parts: means over ranks, medians over steps. Hidden: communication beside"
        " which the rank computes, in no other column; of one step, by the profiler.",
        "heads": ["run", "step", *(part.replace("_", " ") for part in PARTS), "hidden"],
        "rows": rows,
    }


def _rate_table(results: Sequence[Result]) -> Page:
    rows = []
    for result in results:
        slow, fast = (
            result["tokens_per_s"] * result["step_ms"] / edge
            for edge in reversed(result["step_ms_spread"])
        )
        rows.append(
            [
                result["name"],
                f"{result['tokens_per_s']:,.0f} ({slow:,.0f} to {fast:,.0f})",
                *(
                    if_known(result[key])
                    for key in ("tpot_mean_ms", "tpot_ms", "tpot_p99_ms", "tpot_slowest_rank_ms")
                ),
                f"{result['tokens_per_s'] / result['world_size']:,.0f}",
                f"{result['tflops_per_device']:.3g}",
                "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
                f"{result['peak_memory_bytes'] / 1e6:,.0f}",
            ]
        )
    on_cpu = results[0]["device"] == "cpu"
    memory = (
        "resident in a process, what it shares with others included"
        if on_cpu
        else "of the GPU's allocator"
    )
    return {
        "title": "Rates and memory",
        "note": "Measured. TPS: median over steps (slowest to fastest). TPOT: over steps; of the"
        f" slowest rank, the median; p99: of {FEWEST} steps or more. TFLOP/s and MFU: by the"
        f" formula below. Peak memory: of the rank with most, {memory}.",
        "heads": [
            *("run", "TPS", "TPOT ms, mean", "TPOT ms, p50", "TPOT ms, p99"),
            *("TPOT ms, slowest rank", "tokens/s/device", "TFLOP/s/device", "MFU"),
            "peak memory, MB",
        ],
        "rows": rows,
    }


def _decode_table(experiment: ExperimentConfig, results: Sequence[Result]) -> Page:
    request = decode.asked(experiment)
    rows = [
        [
            result["name"],
            f"{result['tokens_per_s']:,.0f}",
            f"{result['ttft_ms']:,.1f}",
            " / ".join(if_known(result[key], 1) for key in ("itl_ms", "itl_p50_ms", "itl_p99_ms")),
            significant(result["tpot_ms"]),
            f"{max(result['kv_bytes']) / 1024:,.1f}",
            f"{sum(result['sent_bytes'].values()) / 1024:,.1f}",
            f"{sum(result['prefill_sent_bytes'].values()) / 1024:,.1f}",
            f"{result['microbatches']}",
        ]
        for result in results
    ]
    return {
        "title": "Decode",
        "note": f"Measured: {request.sequences} sequences, prompts of {request.prompt_length}"
        f" tokens, {request.output_length} new tokens of each, the first one by the prefill. TTFT:"
        " from the start of the prefill to a sequence's first new token, mean over sequences."
        f" Inter-token latency: between two tokens of a sequence; p99: of {FEWEST} or more. KV"
        " cache: of the rank with most.",
        "heads": [
            *("run", "TPS", "TTFT ms", "inter-token latency ms, mean / p50 / p99", "TPOT ms"),
            *("KV cache, KiB a rank", "sent in a decode step, KiB a rank"),
            *("sent in the prefill, KiB a rank", "micro-batches"),
        ],
        "rows": rows,
    }

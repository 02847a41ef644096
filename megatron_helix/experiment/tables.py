"""The report's tables: headings and cells, formatted.

Figures are measured, predicted or claimed; each table says which in its heading, and none stands in
another's column.
"""

from collections.abc import Sequence
from typing import Any

from megatron_helix.experiment import decode, prediction
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    change,
    decoded,
    largest_difference,
    trained,
)

Page = dict[str, Any]


def of_report(
    experiment: ExperimentConfig, results: Sequence[Result], cuts: dict[str, Any]
) -> list[Page]:
    """All of them, as the templates want them; ``cuts`` have the predicted bytes of every run."""
    loops, requests = trained(results), decoded(results)
    return [
        _source_table(experiment, results),
        *([_exactness_table(loops), _time_table(loops)] if loops else []),
        *([_decode_table(experiment, requests)] if requests else []),
        _bytes_table(results, cuts),
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
        claimed = claims.get((result["model"], result["layout"], result["phase"]))
        row = [result["model"], result["layout"], result["phase"]]
        for key, digits in (("tokens_per_s", 0), ("tpot_ms", 2)):
            if claims:
                row.append(f"{getattr(claimed, key):,.{digits}f}" if claimed else "-")
            if machine:
                row.append(f"{result['predicted'][key]:,.{digits}f}")
            row.append(f"{result[key]:,.{digits}f}{change(result[key], base[key])}")
            if machine:
                row.append(f"{prediction.error(result, key):+.0%}")
        rows.append(row)
    note = "In brackets: against the first layout."
    if machine:
        note = f"Predicted for {machine.name}, with no communication hidden. {note}"
    if claims:
        of = "; ".join(sorted({claim.of for claim in experiment.claims}))
        note = f"Claimed figures are those of {of}. {note}"
    return {"title": "Throughput and overhead", "note": note, "heads": heads, "rows": rows}


def _exactness_table(results: Sequence[Result]) -> Page:
    rows = []
    for result in results:
        base = baseline_of(result, results)
        norms = largest_difference(result["grad_norms"], base["grad_norms"])
        rows.append(
            [
                result["name"],
                f"{result['losses'][0]:.6f}",
                f"{result['losses'][-1]:.6f}",
                *(
                    ["baseline", "baseline"]
                    if result is base
                    else [
                        f"{largest_difference(result['losses'], base['losses']):.1e}",
                        f"{norms:.1e}" if result["grad_norms"] else "-",
                    ]
                ),
            ]
        )
    return {
        "title": "Same training",
        "note": "Measured. Largest relative difference to the first layout over all steps.",
        "heads": ["run", "first loss", "last loss", "loss differs by", "gradient norm differs by"],
        "rows": rows,
    }


def _time_table(results: Sequence[Result]) -> Page:
    rows = []
    for result in results:
        low, high = result["step_ms_spread"]
        parts = result["breakdown_ms"]
        rows.append(
            [
                result["name"],
                f"{result['step_ms']:,.1f} ({low:,.1f} to {high:,.1f})",
                *(f"{parts[part]:,.1f}" for part in parts),
                f"{result['tpot_mean_ms']:.2f} / {result['tpot_ms']:.2f} /"
                f" {result['tpot_p99_ms']:.2f} / {result['tpot_slowest_rank_ms']:.2f}",
                f"{result['tokens_per_s'] / result['world_size']:,.0f}",
                f"{result['tflops_per_device']:.3g}",
                "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
            ]
        )
    return {
        "title": "Where a step's time goes",
        "note": "Measured, ms. Step: slowest rank, median (shortest to longest). Parts: means over"
        " ranks and steps.",
        "heads": [
            *("run", "step", "compute", "communication", "waiting", "pipeline idle"),
            *("TPOT mean / p50 / p99 / slowest rank", "tokens/s/device", "TFLOP/s/device", "MFU"),
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
            f"{result['itl_ms']:,.1f} / {result['itl_p50_ms']:,.1f} / {result['itl_p99_ms']:,.1f}",
            f"{result['tpot_ms']:,.2f}",
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
        " Inter-token latency: between two tokens of a sequence. KV cache: of the rank with most.",
        "heads": [
            *("run", "TPS", "TTFT ms", "inter-token latency ms, mean / p50 / p99", "TPOT ms"),
            *("KV cache, KiB a rank", "sent in a decode step, KiB a rank"),
            *("sent in the prefill, KiB a rank", "micro-batches"),
        ],
        "rows": rows,
    }


def _bytes_table(results: Sequence[Result], cuts: dict[str, Any]) -> Page:
    rows = []
    for result in results:
        ranks = cuts[result["name"]]["ranks"] if cuts[result["name"]] else []
        predicted: dict[str, float] = {}
        for rank in ranks:
            for key, value in rank["predicted_bytes"].items():
                predicted[key] = predicted.get(key, 0) + value / len(ranks)
        for key in sorted({*predicted, *result["sent_bytes"]}):
            want, got = predicted.get(key, 0), result["sent_bytes"].get(key, 0)
            if want or got:
                axis, kind = key.split("/")
                axis = axis.removesuffix("_GROUP").replace("_", " ").lower()
                cells = [result["name"], axis, kind.replace("_", " ")]
                rows.append([*cells, f"{want:,.0f}", f"{got:,.0f}"])
    return {
        "title": "Bytes a rank sends in a step",
        "note": "Mean over ranks.",
        "heads": ["run", "axis", "collective", "predicted", "measured"],
        "rows": rows,
    }

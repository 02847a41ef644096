"""Tables of what is alike on every device: layouts, exactness, bytes, weights; and predictions.

Headings and cells, formatted. Figures are measured, predicted or claimed; each table says which in
its heading, and none stands in another's column.
"""

from collections.abc import Sequence
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig, OutlookConfig
from megatron_helix.experiment.results import (
    AXES_SHOWN,
    Result,
    baseline_of,
    by_axis,
    largest_difference,
    significant,
    trained,
)
from megatron_helix.experiment.runs import Run
from megatron_helix.report import outlook
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.verification import expectation

Page = dict[str, Any]


def tables(experiment: ExperimentConfig, results: Sequence[Result]) -> list[Page]:
    """What is alike on every device: layouts, exactness, bytes and weights; what is predicted."""
    loops = trained(results)
    return [
        _layout_table(experiment),
        *([_exactness_table(loops), _held_table(loops)] if loops else []),
        *([_outlook_table(experiment.outlook, experiment)] if experiment.outlook else []),
    ]


def _layout_table(experiment: ExperimentConfig) -> Page:
    """What the names of the layouts stand for, with what ``auto`` takes in training."""
    rows = []
    for model in experiment.models:
        for layout in experiment.layouts:
            run = Run(model=model, layout=layout, phase="train", precision=experiment.precision)
            here = expectation.deployment(experiment, run)
            rows.append(
                [
                    model.name,
                    layout.name,
                    _shared(layout),
                    f"{here.plan.exchange}, {here.plan.split} split" if here.cut.m > 1 else "-",
                    *(str(size) for size in (layout.pp, here.batch_ranks)),
                    f"{layout.cp} ({layout.cp_comm_type})"
                    if layout.cp_comm_type
                    else str(layout.cp),
                    str(layout.ep) if model.num_experts else "-",
                    f"{layout.micro_batch} x {here.microbatches}",
                ]
            )
    shapes = [
        f"{model.name}: {model.num_layers} layers, hidden {model.hidden_size},"
        f" {model.num_attention_heads} heads of {model.kv_channels} and {model.query_groups} query"
        f" groups, MLP {model.ffn_hidden_size}"
        + (
            f", {model.num_experts} experts of which {model.moe_router_topk} a token"
            if model.num_experts
            else ""
        )
        for model in experiment.models
    ]
    return {
        "title": "What is compared",
        "note": "; ".join(shapes) + ". The layouts train from the same weights on the same data."
        " Exchange: what is asked for or `auto` takes in training.",
        "heads": [
            *("model", "layout", "a layer's ranks", "exchange", "PP", "DP", "CP", "EP"),
            "micro-batch x number",
        ],
        "rows": rows,
    }


def _shared(layout: LayoutConfig) -> str:
    """Who has a layer: the ranks that cut it, and those that share out its weights beside."""
    if layout.is_helix:
        return f"m={layout.m}, n={layout.n}"
    beside = {"megatron_fsdp": ", Megatron FSDP", "torch_fsdp2": ", torch FSDP2", None: ""}
    gtp = f", GTP={layout.gtp}" if layout.gtp > 1 else ""
    return f"TP={layout.tp}{beside[layout.fsdp]}{gtp}"


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


def _held_table(results: Sequence[Result]) -> Page:
    """Weights of a rank, and what it sends by axis."""
    sent = [by_axis(result) for result in results]
    axes = [axis for axis in AXES_SHOWN if any(axis in one for one in sent)]
    rows = [
        [
            result["name"],
            significant(result["weight_bytes"] / 1e6),
            significant(sum(own.values()) / 1e6),
            *(significant(own[axis] / 1e6) if axis in own else "-" for axis in axes),
        ]
        for result, own in zip(results, sent, strict=True)
    ]
    return {
        "title": "What a rank holds and sends",
        "note": "Counted, MB. Weights: of the rank with most. Sent: in a step, mean over ranks, and"
        " by the axis of the collective; by kind, beside the prediction, further down.",
        "heads": ["run", "weights held", "sent", *(f"sent, {axis}" for axis in axes)],
        "rows": rows,
    }


def _outlook_table(asked: OutlookConfig, experiment: ExperimentConfig) -> Page:
    found = outlook.rows(experiment)
    return {
        "title": "The same layouts on GPUs: predicted, and claimed by others",
        "note": outlook.note(asked),
        "heads": [
            *("machine", "model", "phase", "layout", "TPS, predicted", "TPS, claimed"),
            *("TPOT ms, predicted", "TPOT ms, claimed", "GB a rank, predicted"),
        ],
        "rows": [
            [row["hardware"], row["model"], row["phase"], row["layout"], *outlook.cells(row, found)]
            for row in found
        ],
    }


def bytes_sent(results: Sequence[Result], cuts: dict[str, Any]) -> Page:
    """Predicted and measured, by axis and kind; ``cuts`` have the predicted bytes of every run."""
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
                axis = (
                    axis.replace("default_pg", "world")
                    .removesuffix("_GROUP")
                    .replace("_", " ")
                    .lower()
                )
                cells = [result["name"], axis, kind.replace("_", " ")]
                rows.append([*cells, f"{want:,.0f}", f"{got:,.0f}"])
    return {
        "title": "Bytes a rank sends in a step",
        "note": "Mean over ranks.",
        "heads": ["run", "axis", "collective", "predicted", "measured"],
        "rows": rows,
    }

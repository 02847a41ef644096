"""Results as tables of the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from megatron_helix.experiment import prediction
from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    change,
    decoded,
    largest_difference,
    read,
    trained,
)

CPU_NOTE = (
    "The ranks share this machine's cores: TPS and TPOT count context switches here, not a link."
    " Bytes and losses are what they are on GPUs."
)


def tables(results: Sequence[Result]) -> list[Table]:
    """What the terminal shows of an experiment: training and prefill, decode, predictions."""
    made = []
    if trained(results):
        made.append(_trained(trained(results)))
    if decoded(results):
        made.append(_decoded(decoded(results)))
    if any(result["predicted"] for result in results):
        made.append(_predicted([result for result in results if result["predicted"]]))
    return made


def _trained(results: list[Result]) -> Table:
    """One line a run. All figures are measured, on the device the title names."""
    first = results[0]
    made = Table(
        title=f"Measured on {first['world_size']} {first['device']} ranks",
        caption="TPS: tokens a second. TPOT: communication and waiting time of a rank, mean over"
        " ranks, for as many tokens as the batch has sequences. MB: sent by a rank in a step."
        " Diff.: of the loss to the baseline's, relative, largest of all steps."
        + (f" {CPU_NOTE}" if first["device"] == "cpu" else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("model", "layout"):
        made.add_column(heading, overflow="fold")  # names give way to figures
    for heading in ("TPS", "TPOT\nms", "MB", "first\nloss", "last\nloss", "diff."):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = baseline_of(result, results)
        difference = largest_difference(result["losses"], baseline["losses"])
        made.add_row(
            result["model"] + (" prefill" if result["phase"] == "prefill" else ""),
            result["layout"],
            f"{result['tokens_per_s']:,.0f}",
            f"{result['tpot_ms']:,.1f}",
            f"{sum(result['sent_bytes'].values()) / 1e6:.2f}",
            f"{result['losses'][0]:.4f}",
            f"{result['losses'][-1]:.4f}",
            "baseline" if result is baseline else f"{difference:.1e}",
            end_section=result is results[-1] or _next(result, results)["model"] != result["model"],
        )
    return made


def _next(result: Result, results: list[Result]) -> Result:
    return results[results.index(result) + 1]


def _decoded(results: list[Result]) -> Table:
    """One line a layout: latencies, and what a rank holds and sends."""
    first = results[0]
    made = Table(
        title=f"Measured on {first['world_size']} {first['device']} ranks: decode of"
        f" {first['batch']} sequences, {first['decode_steps']} steps",
        caption="TTFT: to the first token. ITL: between two tokens of a sequence. TPOT:"
        " communication and waiting of a rank in a decode step. Times in ms; KV cache in KiB a"
        " rank.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("model", "layout"):
        made.add_column(heading, overflow="fold")  # names give way to figures
    for heading in ("TPS", "TTFT", "ITL\nmean", "p50", "p99", "TPOT", "KV"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        made.add_row(
            result["model"],
            result["layout"],
            f"{result['tokens_per_s']:,.0f}",
            *(
                f"{result[key]:,.{0 if result[key] >= 100 else 1}f}"  # four digits at most
                for key in ("ttft_ms", "itl_ms", "itl_p50_ms", "itl_p99_ms", "tpot_ms")
            ),
            f"{max(result['kv_bytes']) / 1024:,.0f}",
        )
    return made


def _predicted(results: list[Result]) -> Table:
    """Predicted beside measured, and how far the prediction is off."""
    made = Table(
        title=f"Predicted for {results[0]['predicted']['hardware']}, and measured",
        caption="Error: of the prediction, relative to the measurement.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("run", overflow="fold")
    for figure in ("TPS", "TPOT ms"):
        for heading in (f"{figure}\npred.", "\nmeas.", "\nerror"):
            made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        cells = []
        for key, digits in (("tokens_per_s", 0), ("tpot_ms", 2)):
            cells += [f"{figures[key]:,.{digits}f}" for figures in (result["predicted"], result)]
            cells.append(f"{prediction.error(result, key):+.0%}")
        made.add_row(result["name"], *cells)
    return made


def compare(first: Path, second: Path) -> Table:
    """Two experiments side by side.

    Raises:
        ValueError: when models, data, batch, request, steps or learning rate are not the same.
    """
    a, b = read(first), read(second)
    for what in ("models", "batch", "decode", "steps", "learning_rate"):
        one, other = getattr(a["experiment"], what), getattr(b["experiment"], what)
        if one != other:
            raise ValueError(
                f"compare: {what} must be equal, got {_shown(one)} in {first} and {_shown(other)}"
                f" in {second}; run both with the same {what}"
            )
    if [*a["data"].values()] != [*b["data"].values()]:
        raise ValueError(f"compare: the data of {first} and {second} must be equal, and differ")
    made = Table(title=f"{second} against {first}, measured", box=box.SIMPLE_HEAD)
    for heading in ("run", "TPS", "TPOT ms", "MB sent", "last loss"):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    others = {result["name"]: result for result in b["results"]}
    shared = [result for result in a["results"] if result["name"] in others]
    if not shared:
        raise ValueError(f"compare: {first} and {second} have no run of the same name")
    for one in shared:
        other = others[one["name"]]
        cells = []
        for key, digits in (("tokens_per_s", 0), ("tpot_ms", 2)):
            cells.append(f"{other[key]:,.{digits}f}{change(other[key], one[key])}")
        sent = [sum(result["sent_bytes"].values()) / 1e6 for result in (one, other)]
        cells.append(f"{sent[1]:.2f}{change(sent[1], sent[0])}")
        losses = [result.get("losses", ())[-1:] for result in (one, other)]
        cells.append(
            f"{losses[1][0]:.6f} ({losses[1][0] - losses[0][0]:+.1e})" if all(losses) else "-"
        )
        made.add_row(one["name"], *cells)
    return made


def _shown(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return ", ".join(str(item) for item in items)

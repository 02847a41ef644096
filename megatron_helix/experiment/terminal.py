"""Results as tables of the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from megatron_helix.experiment import prediction
from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    change,
    decoded,
    largest_difference,
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
        " Diff.: of the loss to the baseline's, relative, largest of all steps. In brackets:"
        " against the first layout." + (f" {CPU_NOTE}" if first["device"] == "cpu" else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("model", "layout"):
        made.add_column(heading, overflow="fold")  # names give way to figures
    for heading in ("TPS", "TPOT\nms", "MB", "last\nloss", "diff."):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = baseline_of(result, results)
        difference = largest_difference(result["losses"], baseline["losses"])
        made.add_row(
            result["model"] + (" prefill" if result["phase"] == "prefill" else ""),
            result["layout"],
            *(
                f"{result[key]:,.{digits}f}{change(result[key], baseline[key], digits=0)}"
                for key, digits in (("tokens_per_s", 0), ("tpot_ms", 1))
            ),
            f"{sum(result['sent_bytes'].values()) / 1e6:.2f}",
            f"{result['losses'][-1]:.4f}",
            "-" if result is baseline else f"{difference:.1e}",
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

"""Results as tables of the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    change,
    decoded,
    largest_difference,
    significant,
    trained,
)
from megatron_helix.report import prediction

CPU_NOTE = (
    "The ranks share this machine's cores: TPS and TPOT count context switches here, not a link."
    " Bytes and losses are what they are on GPUs."
)


def tables(results: Sequence[Result]) -> list[Table]:
    """What the terminal shows of an experiment: a table a phase, predictions."""
    phases = dict.fromkeys(result["phase"] for result in trained(results))
    made = [_trained([one for one in results if one["phase"] == phase]) for phase in phases]
    if made:
        made[-1].caption = _caption(results[0]["device"])
    if decoded(results):
        made.append(_decoded(decoded(results)))
    if any(result["predicted"] for result in results):
        made.append(_predicted([result for result in results if result["predicted"]]))
    return made


def _trained(results: list[Result]) -> Table:
    """One line a run. All figures are measured, on the device the title names."""
    first = results[0]
    made = Table(
        title=f"{first['phase']}, measured on {first['world_size']} {first['device']} ranks",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("model, layout", overflow="fold")  # names give way to figures
    for heading in ("TPS", "TPOT\nms", "MB", "last\nloss", "diff."):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = baseline_of(result, results)
        difference = largest_difference(result["losses"], baseline["losses"])
        if result is baseline:
            made.add_row(result["model"])
        made.add_row(
            f"  {result['layout']}",
            *(
                f"{significant(result[key])}{change(result[key], baseline[key], digits=0)}"
                for key in ("tokens_per_s", "tpot_ms")
            ),
            significant(sum(result["sent_bytes"].values()) / 1e6),
            f"{result['losses'][-1]:.4f}",
            "-" if result is baseline else f"{difference:.1e}",
            end_section=result is results[-1] or _next(result, results)["model"] != result["model"],
        )
    return made


def _caption(device: str) -> str:
    """What the headings of :func:`_trained` mean."""
    said = (
        "TPS: tokens a second. TPOT: communication and waiting time of a rank, mean over ranks, for"
        " as many tokens as the batch has sequences. MB: sent by a rank in a step. Diff.: of the"
        " loss to the baseline's, relative, largest of all steps. In brackets: against the first"
        " layout."
    )
    return f"{said} {CPU_NOTE}" if device == "cpu" else said


def _next(result: Result, results: list[Result]) -> Result:
    return results[results.index(result) + 1]


def _decoded(results: list[Result]) -> Table:
    """One line a layout: latencies, and what a rank holds and sends."""
    first = results[0]
    made = Table(
        title=f"decode of {first['batch']} sequences, {first['decode_steps']} steps, measured on"
        f" {first['world_size']} {first['device']} ranks",
        caption="TTFT: to the first token. ITL: between two tokens of a sequence. TPOT:"
        " communication and waiting of a rank in a decode step. Times in ms; KV cache in KiB a"
        " rank.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("model, layout", overflow="fold")  # names give way to figures
    for heading in ("TPS", "TTFT", "ITL\nmean", "p50", "p99", "TPOT", "KV"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if result is baseline_of(result, results):
            made.add_row(result["model"])
        made.add_row(
            f"  {result['layout']}",
            *(
                significant(result[key])
                for key in (
                    "tokens_per_s",
                    "ttft_ms",
                    "itl_ms",
                    "itl_p50_ms",
                    "itl_p99_ms",
                    "tpot_ms",
                )
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
    made.add_column("model, layout", overflow="fold")
    for figure in ("TPS", "TPOT ms"):
        for heading in (f"{figure}\npred.", "\nmeas.", "\nerror"):
            made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        cells = []
        for key in ("tokens_per_s", "tpot_ms"):
            cells += [significant(figures[key]) for figures in (result["predicted"], result)]
            cells.append(f"{prediction.error(result, key):+.0%}")
        if result is baseline_of(result, results):
            made.add_row(f"{result['model']} {result['phase']}")
        made.add_row(f"  {result['layout']}", *cells)
    return made

"""Results as tables of the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.results import (
    Result,
    baseline_of,
    by_axis,
    change,
    decoded,
    if_known,
    largest_difference,
    significant,
    trained,
)
from megatron_helix.report import outlook, prediction
from megatron_helix.report.counted import experts_held

_SHOWN = 0.01  # of what is sent; axes with less stand in the report

CPU_NOTE = (
    "The ranks share this machine's cores: times count context switches here, not a link, and say"
    " nothing about GPUs. Losses, gradients, bytes and weights are what they are on GPUs."
)


def tables(experiment: ExperimentConfig, results: Sequence[Result]) -> list[Table]:
    """What the terminal shows of an experiment: what the device can show of it comes first.

    On a CPU that is what was compared and counted, then what is predicted; times come last.
    """
    phases = dict.fromkeys(result["phase"] for result in trained(results))
    loops = [[one for one in results if one["phase"] == phase] for phase in phases]
    counted = [_counted(experiment, own) for own in loops]
    times = [_times(own) for own in loops]
    times += [_decoded(decoded(results))] if decoded(results) else []
    with_prediction = [result for result in results if result["predicted"]]
    times += [_predicted(with_prediction)] if with_prediction else []
    on_cpu = experiment.device == "cpu"
    return [*counted, *_outlook(experiment), *times] if on_cpu else [*times, *counted]


def _counted(experiment: ExperimentConfig, results: list[Result]) -> Table:
    """One line a run: how far it leaves the baseline, what a rank sends and holds."""
    first = results[0]
    notes = experts_held(experiment) if first["phase"] == "train" else []
    made = Table(
        title=f"{first['phase']}: exact or not (compared), held and sent by a rank (counted)",
        caption="Differs: from the first layout, relative, largest of all steps. Held and sent: MB;"
        " sent in a step, mean over ranks, over the axes of the layout."
        + "".join(f" {said}" for said in notes),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("model, layout", no_wrap=True)
    for heading in ("loss\ndiffers", "grad norm\ndiffers", "weights\nheld", "sent"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("of it over", overflow="fold")
    for result in results:
        baseline, sent = baseline_of(result, results), by_axis(result)
        if result is baseline:
            made.add_row(result["model"])
        most_first = sorted(sent, key=sent.__getitem__, reverse=True)
        most_first = [axis for axis in most_first if sent[axis] > _SHOWN * sum(sent.values())]
        made.add_row(
            f"  {result['layout']}",
            *(_difference(result, baseline, key) for key in ("losses", "grad_norms")),
            significant(result["weight_bytes"] / 1e6),
            significant(sum(sent.values()) / 1e6),
            ", ".join(f"{axis} {significant(sent[axis] / 1e6)}" for axis in most_first),
            end_section=result is results[-1] or _next(result, results)["model"] != result["model"],
        )
    return made


def _difference(result: Result, baseline: Result, key: str) -> str:
    if result is baseline or not result[key]:
        return "-"
    return f"{largest_difference(result[key], baseline[key]):.1e}"


def _outlook(experiment: ExperimentConfig) -> list[Table]:
    """Predicted for machines that are not here, a table each, beside what others claim."""
    found = outlook.claimed(outlook.rows(experiment))
    made = []
    for machine in dict.fromkeys(row["hardware"] for row in found):
        own = [row for row in found if row["hardware"] == machine]
        table = Table(
            title=f"predicted for {machine}, and claimed",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("model, layout", no_wrap=True)
        for figure in ("TPS\npredicted", "\nclaimed", "TPOT ms\npredicted", "\nclaimed"):
            table.add_column(figure, justify="right", no_wrap=True)
        for row in own:
            if row is outlook.first(row, own):
                table.add_row(f"{row['model']} {row['phase']}")
            *cells, _ = outlook.cells(row, own, narrow=True)
            table.add_row(f"  {row['layout']}\n    {outlook.how(row)}", *cells)
        made.append(table)
    if experiment.outlook:
        made[-1].caption = outlook.note(experiment.outlook)
    return made


def _times(results: list[Result]) -> Table:
    """One line a run. All figures are measured, on the device the title names."""
    first = results[0]
    on_cpu = first["device"] == "cpu"
    where = f"{first['world_size']} {first['device']} ranks"
    made = Table(
        title=f"{first['phase']}: times of shared cores, {where}"
        if on_cpu
        else f"{first['phase']}, measured on {where}",
        caption="TPS: tokens a second. TPOT: communication and waiting time of a rank, mean over"
        " ranks, for as many tokens as the batch has sequences."
        + (f" {CPU_NOTE}" if on_cpu else " In brackets: against the first layout."),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("model, layout", overflow="fold")
    for heading in ("TPS", "TPOT ms", "last loss"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        baseline = baseline_of(result, results)
        if result is baseline:
            made.add_row(result["model"])
        made.add_row(
            f"  {result['layout']}",
            *(
                significant(result[key])
                + ("" if on_cpu else change(result[key], baseline[key], digits=0))
                for key in ("tokens_per_s", "tpot_ms")
            ),
            f"{result['losses'][-1]:.4f}",
            end_section=result is results[-1] or _next(result, results)["model"] != result["model"],
        )
    return made


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
                if_known(result[key])
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
        caption="Error: of the prediction, relative to the measurement."
        + prediction.of_late_hosts(results),
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

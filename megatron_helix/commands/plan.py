"""``helix plan``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.precision import Precision

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_helix.machine.hardware import Hardware
    from megatron_helix.planner.time import Prediction
    from megatron_helix.run_config.layout import LayoutConfig


Phase = Literal["train", "forward", "prefill", "decode"]
Ranking = Literal["tps", "tpot", "memory"]
Sums = Literal["auto", "fp32", "bf16", "fp16"]


def plan(
    model: Annotated[Path, typer.Option(help="A model file (YAML).")],
    hardware: Annotated[Path, typer.Option(help="A hardware file (YAML).")],
    phase: Annotated[
        Phase, typer.Option(help="What is predicted; forward is that of the training loop.")
    ] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1024,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sequence; of the context.")] = 2048,
    documents: Annotated[
        str | None,
        typer.Option(
            help="Sequences are rows of packed documents: a file of their lengths, or"
            " lognormal:MEDIAN:SIGMA."
        ),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Another number of devices.")] = None,
    rank_by: Annotated[Ranking, typer.Option(help="What comes first.")] = "tps",
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="Predict this one, not all: a name from the table, or e.g."
            " tp=8,pp=2,micro_batch=4. Repeatable: the others are compared with the first."
        ),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="Show the sum of this layout, term by term; as --layout.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="bf16 instead of fp16, on a machine with figures for it."),
    ] = None,
    grad_reduce_in_bf16: Annotated[
        bool,
        typer.Option("--grad-reduce-in-bf16", help="As of a run: gradients are added up in bf16."),
    ] = False,
    megatron_fsdp_main_grads_dtype: Annotated[
        Sums, typer.Option(help="As of a run: in which Megatron FSDP adds gradients up.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict layouts of a model on a machine, best first. Nothing runs; nothing is measured."""
    from rich.console import Console

    from megatron_helix.machine import hardware as machines
    from megatron_helix.planner import accuracy, search, verdict
    from megatron_helix.planner.deployment import Deployment
    from megatron_helix.planner.time import predict
    from megatron_helix.run_config.batch import BatchConfig, document_lengths
    from megatron_helix.run_config.files import read_config
    from megatron_helix.run_config.gradients import GradientFlags
    from megatron_helix.run_config.model import ModelConfig

    chosen, machine = read_config(ModelConfig, model), machines.load(hardware)
    if devices:
        machine = machine.scaled(devices)
    lengths = document_lengths(documents) if documents else None
    size = BatchConfig(sequences=batch, sequence_length=seq, documents=lengths)

    width = _precision(precision, machine)
    if explain and layout:
        raise UserError("--explain, --layout: take one at a time, got both; leave one away")
    if grad_reduce_in_bf16 and width != "bf16":
        raise UserError(
            f"--grad-reduce-in-bf16: is read in bf16 alone, got {width}; add --precision bf16, or"
            " leave it out"
        )
    sums = GradientFlags(
        grad_reduce_in_bf16=grad_reduce_in_bf16,
        megatron_fsdp_main_grads_dtype=megatron_fsdp_main_grads_dtype,
    )

    def one(words: str) -> "Prediction":
        made = _layout(words, training_on=machine.devices if phase == "train" else 0)
        here = Deployment(
            *(chosen, made, size, machine.devices, phase, width, machine), gradient_flags=sums
        )
        return predict(here.check(), machine)

    console, most = Console(), machine.memory.rate
    of = f", packed ({documents}; a token's document {size.keys:,.0f})" if documents else ""
    title = f"{chosen.name}, {phase}, {batch} x {seq} tokens{of}, {machine.name}"
    if explain:
        sum_of = one(explain)
        if as_json:
            terms = {"terms": [term._asdict() for term in sum_of.terms]}
            row = _row(sum_of, sum_of, machine, rank_by)
            typer.echo(json.dumps({**_errors(phase), **row, **terms}))
        else:
            console.print(
                _terms(sum_of, title), *verdict.of_memory([sum_of], most), *_decode(phase)
            )
        return
    if layout:
        shown = [one(spec) for spec in layout]
        words = "\n".join([*verdict.of_memory(shown, most), *_decode(phase)])
    else:
        how: dict[str, Any] = {"phase": phase, "precision": width, "gradient_flags": sums}
        found = search.search(chosen, machine, size, rank_by=rank_by, **how)
        shown, words = found.cuts()[:top], verdict.explain(found, rank_by)
        words += f" {len(found.ranked):,} layouts fit, {found.too_large:,} do not."
        words = "\n".join([words, *verdict.of_memory(shown[:1], most)])
    if as_json:
        rows = [_row(one, shown[0], machine, rank_by) for one in shown]
        typer.echo(json.dumps({"plan": title, **_errors(phase), "layouts": rows}, indent=2))
        return
    marks = [_marks(one, shown[0], machine, rank_by) for one in shown]
    made = _table(shown, title, marks, compare=bool(layout))
    if any(tie for tie, _ in marks[1:]):
        made.caption = f"{made.caption} ~: not distinguishable from the first, within"
        made.caption += f" {accuracy.said(rank_by)}."
    if any(near for _, near in marks):
        made.caption = f"{made.caption} ?: may not fit, within {accuracy.said('memory')}."
    # As wide as its rows: a layout's name is one word, which is copied from here.
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(made, options=unbounded).maximum)
    console.print(made, words)


_EXAMPLES = "tp=8,pp=2,micro_batch=4 or m=4,n=4,exchange=weights,micro_batch=16"


def _precision(asked: Precision | None, machine: "Hardware") -> Precision:
    """What is planned for: bf16 where it is asked for, else what the machine's figures are for."""
    if asked == "bf16" and machine.precision == "fp16":  # as wide
        return "bf16"
    if asked in (None, machine.precision):
        return machine.precision
    raise UserError(
        f"--precision: must be {machine.precision}, which {machine.name} has figures for, or bf16"
        f" instead of fp16, got {asked}; leave it out"
    )


def _layout(words: str, *, training_on: int = 0) -> "LayoutConfig":
    """``tp=8,pp=2,micro_batch=4``, or the name that a table gives it, as a layout.

    Args:
        words: of the user.
        training_on: devices of a training run, over which the layouts that the search names share
            out optimizer states; 0 without an optimizer.

    Raises:
        UserError: naming what is wrong.
    """
    from pydantic import ValidationError

    from megatron_helix.planner import search
    from megatron_helix.run_config.layout import LayoutConfig

    named = search.named(words)
    keys: dict[str, Any] = dict(named)
    if not named:
        for word in words.split(","):
            key, equals, value = word.partition("=")
            if not equals or key in keys:
                fault = "is given twice" if equals else "must be a name of the table or KEY=VALUE"
                raise UserError(f"layout: {key} {fault}, got {words!r}; write e.g. {_EXAMPLES}")
            keys[key] = value
    try:
        made = LayoutConfig.model_validate({"name": "given", **keys})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "layout"
        raise UserError(
            f"layout: {where}: {first['msg']}, got {words!r}; write e.g. {_EXAMPLES}"
        ) from None
    update: dict[str, Any] = {"name": search.name(made.model_dump())}
    if named:
        apart = made.tensor_parallel_size * made.pp < training_on
        update["distributed_optimizer"] = apart and made.fsdp is None
    return made.model_copy(update=update)


def _decode(phase: str) -> list[str]:
    from megatron_helix.planner import accuracy

    return [accuracy.DECODE] if phase == "decode" else []


def _errors(phase: str) -> dict[str, Any]:
    """How far predictions are off, for JSON."""
    from megatron_helix.planner import accuracy

    known = {"source": "predicted", "relative_error": accuracy.ERROR}
    return {**known, **({"note": accuracy.DECODE} if phase == "decode" else {})}


def _marks(
    one: "Prediction", first: "Prediction", machine: "Hardware", rank_by: str
) -> tuple[bool, bool]:
    """Whether it is as good as the first, and whether it may not fit."""
    from megatron_helix.planner import accuracy

    return accuracy.alike(first, one, rank_by), accuracy.may_not_fit(one, machine.memory.rate)


def _row(
    one: "Prediction", first: "Prediction", machine: "Hardware", rank_by: str
) -> dict[str, Any]:
    here = one.deployment
    as_first, may_not_fit = _marks(one, first, machine, rank_by)
    return {
        "layout": here.layout.name,
        "tokens_per_s": one.tokens_per_s,
        "tpot_ms": one.tpot_ms,
        "step_ms": one.step_s * 1e3,
        "compute_ms": one.compute_s * 1e3,
        "communication_ms": one.communication_s * 1e3,
        "waiting_ms": one.waiting_s * 1e3,
        "memory_gb": one.memory.total / 1e9,
        "fits": one.memory.total <= machine.memory.rate,
        "may_not_fit": may_not_fit,
        "not_distinguishable_from_first": as_first,
        "microbatches": here.microbatches,
        "waste": here.waste._asdict(),
        "roofline": one.roofline,
        "roofline_resource": one.bounds.resource,
    }


def _table(
    shown: list["Prediction"],
    title: str,
    marks: list[tuple[bool, bool]],
    *,
    compare: bool,
) -> "Table":
    from rich import box
    from rich.table import Table

    from megatron_helix.experiment.results import significant

    made = Table(
        title=f"Predicted: {title}",
        caption="TPS: tokens a second. TPOT: communication and waiting of a rank for as many tokens"
        " as the batch has sequences. comm., wait: of the step. roofline: what is reached of the"
        " layout's own, and which resource sets it.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
    )
    padded = any(map(_padding, shown))
    if padded:
        made.caption = (
            f"{made.caption} zeros: what padding adds to the weights of attention / MLPs."
        )
    made.add_column("layout", no_wrap=True)
    middle = ("TPS\nchange", "TPOT\nchange") if compare else ("step\nms", "wait")
    headings = ("TPS", "TPOT\nms", *middle, "comm.", "GB", "roofline", *["zeros\n%"] * padded)
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    first = shown[0]
    for one, (tie, near) in zip(shown, marks, strict=True):
        speed = one.tokens_per_s / first.tokens_per_s - 1
        lost = one.tpot_ms / first.tpot_ms - 1 if first.tpot_ms else 0.0
        changes = (f"{speed:+.1%}", f"{lost:+.1%}")
        times = (f"{one.step_s * 1e3:,.1f}", f"{one.waiting_s / one.step_s:.0%}")
        made.add_row(
            one.deployment.layout.name,
            f"{one.tokens_per_s:,.0f}{'~' * (tie and one is not first)}",
            f"{one.tpot_ms:.3f}",
            *(changes if compare else times),
            f"{one.communication_s / one.step_s:.0%}",
            f"{significant(one.memory.total / 1e9)}{'?' * near}",
            f"{one.roofline:.0%} {one.bounds.resource}",
            *[_padding(one)] * padded,
        )
    return made


def _padding(one: "Prediction") -> str:
    """What zeros add to the weights of attention / of MLPs, in per cent; empty without any."""
    waste = one.deployment.waste
    return " / ".join(f"{100 * part:.1f}" for part in waste) if any(waste) else ""


def _terms(one: "Prediction", title: str) -> "Table":
    from dataclasses import asdict

    from rich import box
    from rich.table import Table

    from megatron_helix.experiment.results import significant

    bounds = one.bounds
    needs = ", ".join(
        f"{part.replace('_', ' ')} {significant(need / 1e9)}"
        for part, need in asdict(one.memory).items()
    )
    zeros = f" Zeros add {_padding(one)} % to the weights of attention / MLPs."
    zeros = zeros if _padding(one) else ""
    made = Table(
        title=f"Predicted: {one.deployment.layout.name}, {title}",
        caption=f"Time of a rank of the slowest stage. TPS {one.tokens_per_s:,.0f}, TPOT"
        f" {one.tpot_ms:.3f} ms. Least time at the peak of arithmetic"
        f" {bounds.compute_s * 1e3:,.2f} ms, of memory {bounds.memory_s * 1e3:,.2f} ms, of links"
        f" {bounds.link_s * 1e3:,.2f} ms. Memory in GB: {needs}.{zeros}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("term", overflow="fold")
    made.add_column("bound")
    for heading in ("GB sent", "ms", "of step"):
        made.add_column(heading, justify="right")
    for term in one.terms:
        made.add_row(
            term.what,
            term.bound,
            f"{term.sent_bytes / 1e9:,.3f}" if term.sent_bytes else "",
            f"{term.seconds * 1e3:,.3f}",
            f"{term.seconds / one.step_s:.1%}",
        )
    made.add_section()
    made.add_row("step", "", "", f"{one.step_s * 1e3:,.3f}", "100.0%")
    return made

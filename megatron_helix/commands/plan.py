"""``helix plan`` and ``helix calibrate``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_helix.planner.time import Prediction
    from megatron_helix.run_config import LayoutConfig


def plan(
    model: Annotated[Path, typer.Option(help="A model file (YAML).")],
    hardware: Annotated[Path, typer.Option(help="A hardware file (YAML).")],
    phase: Annotated[str, typer.Option(help="train, prefill or decode.")] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1024,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sequence; of the context.")] = 2048,
    devices: Annotated[int | None, typer.Option(min=1, help="Another number of devices.")] = None,
    overlap: Annotated[
        float, typer.Option(help="Fraction of communication that computation may hide.")
    ] = 0.0,
    rank_by: Annotated[str, typer.Option(help="tps, tpot or memory.")] = "tps",
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="Predict this one, not all; e.g. tp=8,pp=2,micro_batch=4. Repeatable: the others"
            " are compared with the first."
        ),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="Show the sum of this layout, term by term.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict layouts of a model on a machine, best first. Nothing runs; nothing is measured."""
    from rich.console import Console

    from megatron_helix.planner import hardware as machines
    from megatron_helix.planner import search
    from megatron_helix.planner.deployment import Deployment
    from megatron_helix.planner.time import predict
    from megatron_helix.run_config import BatchConfig, ModelConfig, read_config

    chosen, machine = read_config(ModelConfig, model), machines.load(hardware)
    if devices:
        machine = machine.scaled(devices)
    size = BatchConfig(sequences=batch, sequence_length=seq)

    def one(words: str) -> "Prediction":
        here = Deployment(chosen, _layout(words), size, machine.devices, phase).check()
        return predict(here, machine, overlap=overlap)

    console = Console()
    title = f"{chosen.name}, {phase}, {batch} x {seq} tokens, {machine.name}, overlap {overlap:g}"
    if explain:
        sum_of = one(explain)
        if as_json:
            typer.echo(json.dumps(_row(sum_of) | {"terms": [t._asdict() for t in sum_of.terms]}))
        else:
            console.print(_terms(sum_of, title))
        return
    if layout:
        shown, words = [one(spec) for spec in layout], ""
    else:
        found = search.search(chosen, machine, size, phase=phase, rank_by=rank_by, overlap=overlap)
        shown, words = found.cuts()[:top], search.explain(found, rank_by)
        words += f" {len(found.ranked):,} layouts fit, {found.too_large:,} do not."
    if as_json:
        rows = [_row(prediction) for prediction in shown]
        typer.echo(json.dumps({"plan": title, "source": "predicted", "layouts": rows}, indent=2))
        return
    console.print(_table(shown, title, compare=bool(layout)))
    if words:
        console.print(words)


def calibrate(
    out: Annotated[Path, typer.Option(help="Hardware file to write.")],
    ranks: Annotated[int, typer.Option(min=2, help="CPU ranks to fork.")] = 2,
) -> None:
    """Measure GEMM rate, memory rate and links of this machine and write a hardware file.

    On the CPU with gloo. For GPUs: torchrun -m megatron_helix.planner.calibrate --out FILE.
    """
    from megatron_helix.planner import calibrate as measuring

    typer.echo(f"{out}: {measuring.on_cpu(ranks, out)}")


def _layout(words: str) -> "LayoutConfig":
    """``tp=8,pp=2,micro_batch=4`` as a layout.

    Raises:
        ValueError: naming what is wrong.
    """
    from pydantic import ValidationError

    from megatron_helix.planner.search import name
    from megatron_helix.run_config import LayoutConfig

    pairs = [word.partition("=") for word in words.split(",")]
    keys: dict[str, Any] = {
        key: int(value) if value.isdigit() else value for key, _, value in pairs
    }
    try:
        made = LayoutConfig.model_validate({"name": "given", **keys})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "layout"
        raise ValueError(
            f"layout: {where}: {first['msg']}, got {words!r}; write e.g."
            " tp=8,pp=2,micro_batch=4 or m=4,n=4,exchange=weights,micro_batch=16"
        ) from None
    return made.model_copy(update={"name": name(made.model_dump())})


def _row(one: "Prediction") -> dict[str, Any]:
    here = one.deployment
    return {
        "layout": here.layout.name,
        "tokens_per_s": one.tokens_per_s,
        "tpot_ms": one.tpot_ms,
        "step_ms": one.step_s * 1e3,
        "compute_ms": one.compute_s * 1e3,
        "communication_ms": one.communication_s * 1e3,
        "waiting_ms": one.waiting_s * 1e3,
        "memory_gb": one.memory.total / 1e9,
        "microbatches": here.microbatches,
        "roofline": one.roofline,
        "roofline_resource": one.bounds.resource,
    }


def _table(shown: list["Prediction"], title: str, *, compare: bool) -> "Table":
    from rich import box
    from rich.table import Table

    made = Table(
        title=f"Predicted: {title}",
        caption="TPS: tokens a second. TPOT: communication and waiting of a rank for as many tokens"
        " as the batch has sequences. comm., wait: of the step. roofline: what is reached of the"
        " layout's own, and which resource sets it.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("layout", overflow="fold", min_width=14)
    middle = ("TPS,\nchange", "TPOT,\nchange") if compare else ("step\nms", "wait")
    for heading in ("TPS", "TPOT\nms", *middle, "comm.", "GB", "roofline"):
        made.add_column(heading, justify="right", no_wrap=True)
    first = shown[0]
    for one in shown:
        speed = one.tokens_per_s / first.tokens_per_s - 1
        lost = one.tpot_ms / first.tpot_ms - 1 if first.tpot_ms else 0.0
        changes = (f"{speed:+.1%}", f"{lost:+.1%}")
        times = (f"{one.step_s * 1e3:,.1f}", f"{one.waiting_s / one.step_s:.0%}")
        made.add_row(
            one.deployment.layout.name,
            f"{one.tokens_per_s:,.0f}",
            f"{one.tpot_ms:.3f}",
            *(changes if compare else times),
            f"{one.communication_s / one.step_s:.0%}",
            f"{one.memory.total / 1e9:.1f}",
            f"{one.roofline:.0%} {one.bounds.resource}",
        )
    return made


def _terms(one: "Prediction", title: str) -> "Table":
    from dataclasses import asdict

    from rich import box
    from rich.table import Table

    bounds = one.bounds
    needs = ", ".join(
        f"{part.replace('_', ' ')} {need / 1e9:.2f}" for part, need in asdict(one.memory).items()
    )
    made = Table(
        title=f"Predicted: {one.deployment.layout.name}, {title}",
        caption=f"Time of a rank of the slowest stage. TPS {one.tokens_per_s:,.0f}, TPOT"
        f" {one.tpot_ms:.3f} ms. Least time at the peak of arithmetic"
        f" {bounds.compute_s * 1e3:,.2f} ms, of memory {bounds.memory_s * 1e3:,.2f} ms, of links"
        f" {bounds.link_s * 1e3:,.2f} ms. Memory in GB: {needs}.",
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

"""The GPU kernels of one step of two layouts by kind, side by side, and those that differ most.

    python benchmarks/step_kernels.py A/torch_profile/rank-0.json.gz B/torch_profile/rank-0.json.gz

A trace is written by a training run with ``--profile --use-pytorch-profiler --profile-step-start 10
--profile-step-end 11 --profile-ranks 0 --tensorboard-dir A``. All figures are measured.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_helix.basics import errors
from megatron_helix.recording import kernels
from megatron_helix.recording.kernels import Kernels, Sum

NONE = Sum()


def main(
    first: Annotated[Path, typer.Argument(help="Trace of the first layout.")],
    second: Annotated[Path, typer.Argument(help="Trace of the second.")],
    names: Annotated[int, typer.Option(min=0, help="Kernels that differ most.")] = 15,
) -> None:
    """Print the two tables."""
    with errors.told():
        of = kernels.read(first), kernels.read(second)
    console = Console(width=120)
    console.print(by_kind(*of))
    console.print(by_name(*of, count=names))


def by_kind(first: Kernels, second: Kernels) -> Table:
    """Milliseconds and calls of every kind, and what the GPU was busy with."""
    table = _table("ms of a step, measured", "kind")
    for kind in kernels.KINDS:
        _row(table, kind, first.kinds.get(kind, NONE), second.kinds.get(kind, NONE))
    table.add_section()
    for name in ("any_ms", "compute_ms", "span_ms"):
        a, b = getattr(first, name), getattr(second, name)
        table.add_row(_SPANS[name], f"{a:.1f}", "", f"{b:.1f}", "", f"{b - a:+.1f}")
    return table


def by_name(first: Kernels, second: Kernels, *, count: int) -> Table:
    """The kernels whose sums differ most."""
    table = _table("the kernels that differ most", "kernel")
    both = first.names | second.names
    sums = {name: (first.names.get(name, NONE), second.names.get(name, NONE)) for name in both}
    ordered = sorted(sums, key=lambda name: -abs(sums[name][1].ms - sums[name][0].ms))
    for kind, name in ordered[:count]:
        _row(table, f"{kind}: {name[:60]}", *sums[kind, name])
    return table


_SPANS = {"any_ms": "any kernel", "compute_ms": "any but NCCL", "span_ms": "first to last"}


def _table(title: str, what: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(what)
    for column in ("first", "calls", "second", "calls", "more"):
        table.add_column(column, justify="right")
    return table


def _row(table: Table, what: str, a: Sum, b: Sum) -> None:
    more = f"{b.ms - a.ms:+.1f}"
    table.add_row(what, f"{a.ms:.1f}", str(a.calls), f"{b.ms:.1f}", str(b.calls), more)


if __name__ == "__main__":
    typer.run(main)

"""One attention layer with fewer query groups than ranks: stock's gathered QKV against helix.

    python benchmarks/few_query_groups.py --out runs/few_query_groups

Sixteen CPU ranks of one launch, 16 heads, 2 query groups. For fewer query groups than tensor-
parallel ranks stock Megatron all-gathers the whole QKV over all ranks and lets each cut out its
part; helix exchanges segments of a head within a dim group. Forward and backward of both, from the
same weights and input, take turns; a round's time is that of the slowest rank.

``exchange`` is what a rank sends beyond the residual stream, which a stock layer with as many query
groups as heads measures: it has nothing to exchange. The exit code is 1 when an output or an input
gradient is not stock's. With ``--rate`` each rank is a host of its own behind a slow link (root and
iproute2 needed, see ``emulated_hosts.py``); without, ranks share memory, and times are overheads.
"""

import dataclasses
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from attention_layer import Layer, Shape, Variant
from rich.console import Console
from rich.table import Table

from megatron_helix.launching import fork_ranks
from megatron_helix.upstream import cpu_device, patches

# Of the largest element: roundings of single precision, for sums are in another order.
TOLERANCE = 100 * torch.finfo(torch.float32).eps

VARIANTS = (
    Variant(),
    Variant(exchange="activations", split="batch"),
    Variant(exchange="activations", split="sequence"),
    Variant(exchange="scores"),
    Variant(sequence_parallel=True),
    Variant(exchange="activations", split="batch", sequence_parallel=True),
    Variant(exchange="weights", split="batch", sequence_parallel=True),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and the ranks' logs.")],
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = Shape.heads,
    groups: Annotated[int, typer.Option(min=1, help="Query groups.")] = Shape.groups,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = Shape.head_dim,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the stream.")] = Shape.hidden,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = Shape.sequence,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = Shape.batch,
    m: Annotated[int, typer.Option(min=1, help="Segments of a head.")] = Shape.m,
    n: Annotated[int, typer.Option(min=1, help="Head groups.")] = Shape.n,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Turns before them.")] = 2,
    rate: Annotated[str, typer.Option(help="Links of emulated hosts, say 100mbit.")] = "",
) -> None:
    """Measure every variant in turns, print a table and write OUT/results.json."""
    shape = Shape(
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        hidden=hidden,
        sequence=sequence,
        batch=batch,
        m=m,
        n=n,
    )
    cpu_device.enable()
    patches.quieten()
    import_module("megatron.core.transformer.attention")  # slow: forked ranks inherit it

    torch.set_num_threads(1)  # a forked rank cannot use its parent's thread pool
    out.mkdir(parents=True, exist_ok=True)
    found = out / "rank00.json"
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        if rate:
            from emulated_hosts import emulated_hosts

            hosts = stack.enter_context(emulated_hosts(m * n, rate))
            where = {"address": hosts.address, "enter": hosts.enter}
        ranks = fork_ranks.Ranks(
            target=_rank,
            args=(shape, rounds, warmup, found),
            world_size=m * n,
            logs=out / "logs",
            **where,
        )
        fork_ranks.run(ranks, timeout_s=3600)
    rows = json.loads(found.read_text())
    found.unlink()
    result = {"shape": asdict(shape), "rounds": rounds, "rate": rate or None, "source": "measured"}
    (out / "results.json").write_text(json.dumps({**result, "variants": rows}, indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else 120).print(_table(shape, rows))
    if any(row["difference"] > TOLERANCE for row in rows):
        raise typer.Exit(1)


def _rank(shape: Shape, rounds: int, warmup: int, found: Path) -> None:
    dist.init_process_group("gloo")
    rows = measure(shape, rounds, warmup)
    if dist.get_rank() == 0:
        found.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def measure(shape: Shape, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """A row for every variant, the same on all ranks; to be called on m x n ranks.

    Times are of forward and backward on the slowest rank; ``sent_bytes`` and ``exchange_bytes``
    are what one rank sends in both; ``difference`` is the largest one to stock of the output and of
    the input's gradient, relative to their largest element.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=shape.m * shape.n)
    model_parallel_cuda_manual_seed(1)
    layers = {variant: Layer(shape, variant) for variant in VARIANTS}
    many = dataclasses.replace(shape, groups=shape.heads)
    stream = {sp: Layer(many, Variant(sequence_parallel=sp)).sent_bytes() for sp in (False, True)}
    sent = {variant: layer.sent_bytes() for variant, layer in layers.items()}
    expected = layers[VARIANTS[0]].whole()
    differences = {
        variant: _difference(layer.whole(), expected) for variant, layer in layers.items()
    }
    times: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(warmup + rounds):
        for variant, layer in layers.items():
            dist.barrier()
            start = time.perf_counter()
            layer.step()
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn >= warmup:
                times[variant].append(slowest.item() * 1e3)
    parallel_state.destroy_model_parallel()
    rows = []
    for variant in VARIANTS:
        stock = Variant(sequence_parallel=variant.sequence_parallel)
        ratios = [a / b for a, b in zip(times[stock], times[variant], strict=True)]
        exchange = {v: sent[v] - stream[v.sequence_parallel] for v in (variant, stock)}
        rows.append(
            {
                "variant": variant.name,
                "ms": statistics.median(times[variant]),
                "ms_quartiles": _quartiles(times[variant]),
                "times_faster_than_stock": statistics.median(ratios),
                "times_faster_quartiles": _quartiles(ratios),
                "sent_bytes": sent[variant],
                "exchange_bytes": exchange[variant],
                "times_fewer_sent_bytes": sent[stock] / sent[variant],
                # `weights` shrinks the stream itself: its exchange may be less than nothing.
                "times_fewer_exchange_bytes": (
                    exchange[stock] / exchange[variant] if exchange[variant] > 0 else None
                ),
                "difference": differences[variant],
            }
        )
    return rows


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    )


def _quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    if len(values) == 1:
        return values * 2
    return statistics.quantiles(values, n=4, method="inclusive")[::2]


def _table(shape: Shape, rows: list[dict[str, Any]]) -> Table:
    title = (
        f"{shape.heads} heads, {shape.groups} query groups, {shape.batch} x {shape.sequence}"
        f" tokens, helix {shape.m}x{shape.n} and stock TP={shape.m * shape.n}"
    )
    table = Table(title=title)
    table.caption = "forward and backward; ms: median (quartiles); MB a rank; x: stock's / its own"
    for name in ("layout", "ms", "time x", "sent MB", "sent x", "exchange MB", "exchange x"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for row in rows:
        low, high = row["ms_quartiles"]
        fewer = row["times_fewer_exchange_bytes"]
        table.add_row(
            row["variant"],
            f"{row['ms']:,.0f} ({low:,.0f}-{high:,.0f})",
            f"{row['times_faster_than_stock']:.2f}",
            f"{row['sent_bytes'] / 1e6:.2f}",
            f"{row['times_fewer_sent_bytes']:.2f}",
            "-" if fewer is None else f"{row['exchange_bytes'] / 1e6:.2f}",
            "-" if fewer is None else f"{fewer:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

"""What an exchange costs beside the collective in it, and how much of a weight gather is exposed.

    torchrun --nproc-per-node 2 benchmarks/exchange_kernels.py --out runs/exchange_kernels.json
    torchrun --nproc-per-node 2 benchmarks/exchange_kernels.py --device cpu --hidden 64 \
        --heads 4 --head-dim 16 --ffn 256 --sequence 32 --batch 4 --out runs/tried.json

The layer shape of the source experiment by default, cut m x n over the ranks with n = 1: all of
them are one dim group. Three tables, all measured, medians on the slowest rank:

* the ceiling: bus bandwidth of plain collectives on one large buffer;
* the exchanges: time of each, of its collective alone, its kernels beside that, bus bandwidth;
* the gather of weights: a chain of MLP linears whose gathers begin early, late, or not at all,
  since the weights are there. The exposed part is (early - none) / (late - none). With a backward
  pass it counts the exchange of the weights' gradients, which the last arm adds up instead.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from megatron_helix.exchange.activations import context_to_segments, qkv_to_whole_heads
from megatron_helix.exchange.gathered_weight import Ahead, GatheredWeight
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.step_sums import StepSums
from megatron_helix.exchange.tokens import to_block_order
from megatron_helix.exchange.weights import column_linear, row_linear
from megatron_helix.kernels.collectives import all_to_all, gather
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.process_groups import HelixGroups, carve

Step = Callable[[], Any]
SPLIT = Plan(exchange="weights", split="batch")
CHAIN = 8  # linears; the first gather of a chain is exposed in any case


def main(
    out: Annotated[Path, typer.Option(help="File of the results (JSON).")],
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu rehearses.")] = "cuda",
    hidden: int = 8192,
    heads: int = 16,
    head_dim: int = 512,
    ffn: int = 32768,
    sequence: int = 2048,
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=3)] = 20,
) -> None:
    """Measure on the ranks that torchrun started; rank 0 prints and writes OUT."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron runs GPUs
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    layout = HelixLayout(
        m=dist.get_world_size(),
        n=1,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=head_dim,
        rotary_dim=head_dim,
    )
    group = dist.group.WORLD
    assert group is not None
    bench = Bench(device, carve(layout, group), repeats)
    torch.manual_seed(dist.get_rank())
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "ranks": layout.size,
        "torch": torch.__version__,
        "source": "measured",
        "ceiling": bench.ceiling(sequence * batch * hidden),
        "exchanges": bench.exchanges(layout, sequence, batch, hidden, ffn),
        "overlap": bench.overlap(sequence * batch // layout.m, hidden, ffn),
    }
    if dist.get_rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        for name in ("ceiling", "exchanges", "overlap"):
            _print(f"{name}, {layout.size} x {found['device']}, measured", found[name])
    dist.destroy_process_group()


class Bench:
    """Times steps on all ranks at once."""

    def __init__(self, device: str, groups: HelixGroups, repeats: int):
        self.device, self.groups, self.repeats = device, groups, repeats
        self.dtype = torch.float16 if device == "cuda" else torch.float32

    def random(self, *size: int) -> torch.Tensor:
        """Of the dtype that is measured; small, so that chains of products stay finite."""
        return torch.randn(*size, device=self.device, dtype=self.dtype) / size[-1] ** 0.5

    def ms(self, step: Step) -> float:
        """Median milliseconds on the slowest rank."""
        for _ in range(3):
            step()
        times = [self._once(step) for _ in range(self.repeats)]
        median = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(median, op=dist.ReduceOp.MAX)
        return float(median)

    def _once(self, step: Step) -> float:
        dist.barrier()
        if self.device == "cpu":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def kernels(self, step: Step) -> dict[str, float]:
        """Kernels of a step that are not NCCL's, and their milliseconds; none known on a CPU."""
        if self.device == "cpu":
            return {}
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
        return {
            f"{place} {event.name[:60]}": event.device_time_total / 1e3
            for place, event in enumerate(events)
            if "nccl" not in event.name.lower()
        }

    def _bus(self, whole: torch.Tensor, ms: float) -> float:
        """GB/s over the link: (p-1)/p of the whole buffer leaves a rank."""
        p = dist.get_world_size()
        return whole.numel() * whole.element_size() * (p - 1) / p / ms / 1e6

    def ceiling(self, elements: int) -> list[dict[str, Any]]:
        """Plain collectives on a buffer of ``elements`` a rank sends or receives in all."""
        p = dist.get_world_size()
        whole = self.random(elements // p * p)
        part = whole.new_empty(whole.numel() // p)
        other = torch.empty_like(whole)
        steps: dict[str, Step] = {
            "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
            "all-to-all": lambda: dist.all_to_all_single(other, whole),
        }
        rows = []
        for name, step in steps.items():
            ms = self.ms(step)
            mb = whole.numel() * whole.element_size() / 1e6
            rows.append({"collective": name, "MB": mb, "ms": ms, "GB/s": self._bus(whole, ms)})
        return rows

    def exchanges(
        self, layout: HelixLayout, sequence: int, batch: int, hidden: int, ffn: int
    ) -> list[dict[str, Any]]:
        """Each exchange of a layer, forward, beside its collective alone on as many bytes."""
        m, dim = layout.m, self.groups.dim
        width = layout.num_attention_heads * layout.kv_channels
        qkv = self.random(sequence, batch, 3 * width // m)
        context = self.random(sequence, batch // m, width)
        stream = self.random(sequence // m, batch, hidden)
        swapped: list[tuple[str, torch.Tensor, Step]] = [
            ("QKV", qkv, lambda: qkv_to_whole_heads(qkv, layout, dim)),
            ("context", context, lambda: context_to_segments(context, layout, dim)),
            ("token order", stream, lambda: to_block_order(stream, SPLIT, layout, dim)),
        ]
        rows = []
        for name, tensor, step in swapped:
            plain = tensor.view(m, -1)
            rows.append(self._exchange(name, tensor, step, lambda x=plain: all_to_all(x, dim)))
        tiles = layout.num_attention_heads * layout.segment_blocks
        for name, shards, size in (
            ("W_qkv", Shards(axis=0, outer=3 * tiles), (3 * width // m, hidden)),
            ("W_o", Shards(axis=1, outer=tiles), (hidden, width // m)),
            ("W_fc1", Shards(axis=0), (ffn // m, hidden)),
            ("W_fc2", Shards(axis=1), (hidden, ffn // m)),
        ):
            shard = torch.nn.Parameter(self.random(*size))
            weight = GatheredWeight(shard, shards, dim)
            alone = shard.detach()
            whole = torch.empty((m, *size), dtype=self.dtype, device=self.device)
            step = weight.whole
            rows.append(self._exchange(name, whole, step, lambda x=alone: gather(x, dim)))
        return rows

    def _exchange(self, name: str, moved: torch.Tensor, step: Step, plain: Step) -> dict[str, Any]:
        with torch.no_grad():
            ms, alone = self.ms(step), self.ms(plain)
            kernels = self.kernels(step)
        return {
            "exchange": name,
            "MB": moved.numel() * moved.element_size() / 1e6,
            "ms": ms,
            "collective ms": alone,
            "kernels": len(kernels),
            "kernels ms": sum(kernels.values()),
            "GB/s": self._bus(moved, ms),
            "kernel names": list(kernels),
        }

    def overlap(self, tokens: int, hidden: int, ffn: int) -> list[dict[str, Any]]:
        """Chains of fc1, fc2, ... forward, and forward with backward."""
        m, dim = self.groups.dim.size(), self.groups.dim
        shards = [
            torch.nn.Parameter(self.random(*((hidden, ffn // m) if row else (ffn // m, hidden))))
            for row in map(bool, (place % 2 for place in range(CHAIN)))
        ]
        x = self.random(tokens, hidden).requires_grad_()

        def chain(kept: bool, early: bool) -> tuple[Step, Step]:
            weights = [
                GatheredWeight(shard, Shards(axis=place % 2), dim)
                for place, shard in enumerate(shards)
            ]
            for weight in weights:
                weight.early, weight.keeps = early, kept
                weight.sums = StepSums(weight.shard, weight.shards, dim) if kept else None

            def forward() -> torch.Tensor:
                y = x
                for place, weight in enumerate(weights):
                    ahead = Ahead(
                        forward=weights[place + 1 : place + 2],
                        backward=weights[max(place - 1, 0) : place],
                    )
                    linear = row_linear if place % 2 else column_linear
                    y = linear(y, weight, self.groups.head, ahead if early else Ahead())
                return y

            def both() -> None:
                y = forward()
                y.backward(torch.ones_like(y))
                for shard in shards:
                    shard.grad = None

            return forward, both

        arms: dict[str, tuple[Step, Step]] = {
            "no gather": chain(True, False),
            "late": chain(False, False),
        }
        if self.device == "cuda":
            arms["early"] = chain(False, True)
        rows = []
        for place, name in enumerate(("forward", "forward and backward")):
            row: dict[str, Any] = {"chain": f"{CHAIN} linears, {name}"}
            for arm, steps in arms.items():
                with torch.set_grad_enabled(place == 1):
                    row[f"{arm} ms"] = self.ms(steps[place])
            if "early" in arms:
                late, early = (row[f"{arm} ms"] - row["no gather ms"] for arm in ("late", "early"))
                row["exposed"] = early / late
            rows.append(row)
        return rows


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    shown = [key for key in rows[0] if key != "kernel names"]
    for key in shown:
        table.add_column(key, justify="right" if key != shown[0] else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in shown))
    Console(width=150).print(table)


def _cell(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)

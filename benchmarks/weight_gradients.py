"""A gathered weight's gradient on its way into ``main_grad``: reduce-scattered, or in parts.

    torchrun --nproc-per-node 2 benchmarks/weight_gradients.py --out runs/weight_gradients.json
    torchrun --nproc-per-node 2 benchmarks/weight_gradients.py --device cpu --scale 16 \
        --tokens 64 --out runs/tried.json

All ranks are one dim group. For each weight, two ways to the same fp32 ``main_grad``:

* ``reduce-scatter``: summed in half precision by the collective, turned where the shard lies
  transposed, and added by the hook of Megatron's data parallelism;
* ``parts``: exchanged by an all-to-all and added up by :mod:`megatron_helix.kernels.sums`, in fp32.

Measured, medians on the slowest rank: the way alone, its collective alone, the way begun beside the
GEMM of the input gradient (what a linear's backward pass does) above that GEMM alone, the most
memory it takes, and its error against double precision. Needs neither Megatron nor a model.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.kernels import sums
from megatron_helix.kernels.collectives import start_exchange, start_scatter_sum

WEIGHTS = {  # features and channels of the head group's weight
    "8192 x 32768": (32768, 8192),
    "3584 x 18944": (18944, 3584),
}
Way = Callable[[], Callable[[], None]]  # begins, and gives what waits and adds
COLUMNS = ("weight", "shard", "dtype", "way", "ms", "collective ms", "exposed ms", "MB", "error")


class Bench:
    """Times steps on all ranks at once."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.on_gpu = device == "cuda"
        group = dist.group.WORLD
        assert group is not None
        self.group, self.m = group, group.size()

    def ms(self, step: Callable[[], Any]) -> float:
        """Median milliseconds on the slowest rank."""
        for _ in range(3):
            step()
        median = statistics.median(self._once(step) for _ in range(self.repeats))
        slowest = torch.tensor(median, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def _once(self, step: Callable[[], Any]) -> float:
        dist.barrier()
        if not self.on_gpu:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def peak_mb(self, step: Callable[[], Any]) -> float:
        """Memory that a step takes at its highest point; nothing known on a CPU."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def weight(
        self, features: int, channels: int, turned: bool, dtype: torch.dtype, tokens: int
    ) -> list[dict[str, Any]]:
        """Both ways of one weight's gradient; ``turned``: of a row linear, cut by columns."""
        m, rows = self.m, features // self.m
        torch.manual_seed(dist.get_rank())
        parts = torch.randn(m, rows, channels, device=self.device).to(dtype)
        shape = (channels, rows) if turned else (rows, channels)
        main_grad = torch.zeros(shape, device=self.device)
        grad = torch.randn(tokens, features, device=self.device).to(dtype)
        weight = torch.randn(features, channels, device=self.device).to(dtype)

        def scattered() -> Callable[[], None]:
            coming = start_scatter_sum(parts.flatten(0, 1), self.group, early=self.on_gpu)

            def add() -> None:
                gradient = coming.wait()
                # Autograd copies what does not lie as the parameter does.
                main_grad.add_(gradient.t().contiguous() if turned else gradient)

            return add

        def in_parts() -> Callable[[], None]:
            coming = start_exchange(parts, self.group, early=self.on_gpu)
            return lambda: sums.add(main_grad.t() if turned else main_grad, coming.wait())

        collectives = {
            "reduce-scatter": lambda: start_scatter_sum(
                parts.flatten(0, 1), self.group, early=False
            ),
            "parts": lambda: start_exchange(parts, self.group, early=False),
        }
        gemm = self.ms(lambda: grad @ weight)
        found = []
        ways: dict[str, Way] = {"reduce-scatter": scattered, "parts": in_parts}
        for name, way in ways.items():

            def beside(way: Way = way) -> None:
                add = way()
                _ = grad @ weight
                add()

            main_grad.zero_()
            way()()
            error = self._error(main_grad.t() if turned else main_grad, parts)
            found.append(
                {
                    "way": name,
                    "ms": self.ms(lambda way=way: way()()),
                    "collective ms": self.ms(collectives[name]),
                    "exposed ms": self.ms(beside) - gemm,
                    "gemm ms": gemm,
                    "MB": self.peak_mb(lambda way=way: way()()),
                    "error": error,
                }
            )
        return found

    def _error(self, found: torch.Tensor, parts: torch.Tensor) -> float:
        """Relative, of all ranks: each sends its part of the first rows to be summed in double."""
        some = parts[:, :64].contiguous()
        mine = torch.empty_like(some)
        dist.all_to_all_single(mine, some)
        exact = mine.double().sum(0)
        off = (found[:64].double() - exact).square().sum()
        squares = torch.stack([off, exact.square().sum()])
        dist.all_reduce(squares)
        return float((squares[0] / squares[1]).sqrt())


def main() -> None:
    """Measure on the ranks that torchrun started; rank 0 prints and writes the results."""
    parser = argparse.ArgumentParser(description="Weight gradients over a dim group")
    parser.add_argument("--out", type=Path, required=True, help="file of the results (JSON)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides both sides of a weight")
    parser.add_argument("--tokens", type=int, default=8192, help="of the GEMM beside it")
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron runs GPUs
    if asked.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    bench = Bench(asked.device, asked.repeats)
    rows = []
    for name, (features, channels) in WEIGHTS.items():
        for turned in (False, True):
            for dtype in (torch.bfloat16, torch.float16):
                cut = features // asked.scale, channels // asked.scale
                for row in bench.weight(*cut, turned, dtype, asked.tokens):
                    shard = "columns" if turned else "rows"
                    rows.append({"weight": name, "shard": shard, "dtype": str(dtype)[6:], **row})
    if dist.get_rank() == 0:
        found = {
            "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu",
            "ranks": bench.m,
            "torch": torch.__version__,
            "source": "measured",
            "scale": asked.scale,
            "tokens": asked.tokens,
            "ways": rows,
        }
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{bench.m} x {found['device']}, measured")
        for row in ({name: name for name in COLUMNS}, *rows):
            print("  ".join(f"{_cell(row[name]):>14}" for name in COLUMNS))
    dist.destroy_process_group()


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

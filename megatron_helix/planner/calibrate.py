"""Measure this machine and write what was found as a hardware file.

On CPUs :func:`on_cpu` forks gloo ranks. On GPUs each rank is one of torchrun's::

    torchrun --nproc-per-node 8 -m megatron_helix.planner.calibrate --out hardware.yaml

which measures with NCCL, by the same code with events of CUDA for a clock. It has been run on two
and four H200 of one host (``configs/hardware/h200_2.yaml``, ``h200_4.yaml``), not on several hosts.

Each collective is timed at a small and a large size, among the ranks of a node and, where there are
several nodes, among all. With the alpha-beta model of
:meth:`megatron_helix.machine.hardware.Hardware.seconds`, ``t = hops alpha + bytes / beta``, the two
give latency and bandwidth of each level of links, by kind and the medians over the kinds. GEMMs
multiply random numbers, and many in a row on a GPU: constants, or one product alone, draw less
power and run at a higher clock than a model does. Core attentions are timed as layers have them
(:mod:`megatron_helix.planner.core_timing`), and on GPUs collectives beside GEMMs and how long a
process takes to start a layer (:mod:`megatron_helix.planner.host_timing`). Not measured are
``streaming``, ``gap``, ``arrival`` and ``fused_attention``, which are of whole steps: those of two
H200 are written for H100 and H200, with their source, and none for other cards.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_helix.basics import errors, files, signals
from megatron_helix.basics.errors import UserError
from megatron_helix.machine import hopper
from megatron_helix.machine.hardware import crossing, hops
from megatron_helix.planner.book import share
from megatron_helix.upstream import cpu_device

REPEATS = 5
GEMMS_ON_GPU = 200  # in a row: a quarter of a second
SMALL, LARGE = 256, 2**20  # elements a rank puts in; on GPUs the large one is 64 times that
_BEGUN_EARLY = {  # what stands for each of what moves beside computation
    "weights": "all_gather",
    "gradients": "all_to_all",
    "tokens": "reduce_scatter",
    "replicas": "reduce_scatter",
}
Measured = dict[str, Any]


def on_cpu(ranks: int, out: Path) -> str:
    """Measure with ``ranks`` forked gloo ranks and write ``out``; one line that says what.

    Raises:
        UserError: when ``out`` is a folder, or cannot be made.
    """
    from megatron_helix.launching import fork_ranks

    prepare(out)
    with tempfile.TemporaryDirectory(prefix="helix-calibrate-") as name:
        found = Path(name) / "measured.json"
        fork_ranks.run(
            fork_ranks.Ranks(
                target=_cpu_rank, args=(found,), world_size=ranks, logs=found.with_name("logs")
            )
        )
        measured = json.loads(found.read_text())
    write(measured, out)
    return summary(out)


def prepare(out: Path) -> None:
    """Make the folder of a file to write.

    Raises:
        UserError: when ``out`` is a folder, or cannot be made.
    """
    if out.is_dir():
        raise UserError(f"--out: must be a file to write, got the folder {out}; name a file in it")
    files.require_place(out, "--out")
    files.make_folder(out.parent, "--out")


def _cpu_rank(found: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = measure("cpu", dist.get_world_size())
    if dist.get_rank() == 0:
        files.write(found, json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def measure(device: str, per_node: int) -> Measured:
    """Rates of one device and of the links; every rank must call this.

    Args:
        device: ``cpu`` or ``cuda``.
        per_node: neighbouring ranks that share a node.
    """
    dtype, factor = (torch.float16, 64) if device == "cuda" else (torch.float32, 1)
    clock = _gpu_seconds if device == "cuda" else _cpu_seconds
    ranks = dist.get_world_size()
    size, products = (8192, GEMMS_ON_GPU) if device == "cuda" else (512, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=c)

    gemm = products * 2 * size**3 / clock(multiply)
    source = torch.ones(LARGE * factor * 4, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / clock(lambda: target.copy_(source))
    node, _ = dist.new_subgroups(per_node)
    assert isinstance(node, dist.ProcessGroup)
    groups: dict[str, dist.ProcessGroup] = {"intra_node": node}
    if ranks > per_node:
        assert dist.group.WORLD is not None
        groups["inter_node"] = dist.group.WORLD
    links = {}
    for level, group in groups.items():
        links[level] = _links(group, per_node, clock, source[: LARGE * factor])
    # On a CPU nothing is begun early: a collective would take the cores that compute.
    beside = _beside(node, a, source[: LARGE * factor]) if device == "cuda" else {}
    if device == "cuda":
        held = torch.cuda.get_device_properties(0).total_memory
        name = f"{ranks} x {torch.cuda.get_device_name()}"
    else:
        held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        name = f"{ranks} CPU ranks, gloo"
    return {
        "name": name,
        "ranks": ranks,
        "devices_per_node": per_node,
        "gemm": gemm,
        "memory": held,
        "copied": copied,
        "element_bytes": source.element_size(),
        "links": links,
        "beside": beside,
        **_of_modules(device),
    }


def _beside(group: dist.ProcessGroup, a: torch.Tensor, x: torch.Tensor) -> dict[str, Any]:
    """How collectives and GEMMs beside them get on.

    Some collectives alone, GEMMs alone that take as long, GEMMs while the collectives run, and both
    until both are through. Keys and values in a ring are not measured: as replicas, it is written.
    """
    c = torch.empty_like(a)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(a, a, out=c)

    def wait(works: list[Any]) -> None:
        for work in works:
            work.wait()

    one = _gpu_seconds(lambda: products(GEMMS_ON_GPU)) / GEMMS_ON_GPU
    found = {}
    for moved, kind in _BEGUN_EARLY.items():
        collective = _collective(kind, x, group, async_op=True)

        def begin(collective: Callable[[], Any] = collective) -> list[Any]:
            return [collective() for _ in range(REPEATS)]

        alone = _gpu_seconds(lambda begin=begin: wait(begin()))
        count = max(1, round(alone / one))

        def until_computed(begin: Any = begin, count: int = count) -> list[Any]:
            works = begin()
            products(count)
            return works

        computed = _gpu_seconds(lambda count=count: products(count))
        busy = _gpu_seconds(until_computed)
        together = _gpu_seconds(lambda both=until_computed: wait(both()))
        hidden = min(1.0, max(0.0, 1 - (together - busy) / alone))
        slowed = min(1.0, max(0.0, (busy - computed) / (hidden * alone))) if hidden else 0.0
        found[moved] = {"hidden": round(hidden, 3), "slowed": round(slowed, 3)}
    return found


def _of_modules(device: str) -> Measured:
    """Times of core attentions, for ``--helix-core-attention auto``; of processes beside GPUs."""
    from megatron_helix.planner import core_timing, host_timing  # slow: they import Megatron

    if device == "cpu":
        cpu_device.enable()
    with core_timing.alone():
        times = [each.model_dump() for each in core_timing.measure(device)]
        found: Measured = {"core_attention": times}
        if device == "cuda":
            host = host_timing.measure(device)
            found["host"] = {each: _slowest([taken], device) for each, taken in host.items()}
    return found


def _links(
    group: dist.ProcessGroup, per_node: int, clock: Callable, large: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """(bandwidth, latency of a hop) by kind of collective, of the slowest level the group uses."""
    ranks = group.size()
    found = {}
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        points = []
        for elements in (SMALL, large.numel()):
            x = large[: elements - elements % ranks].clone()
            points.append((x.nbytes * share(kind, ranks), clock(_collective(kind, x, group))))
        (few, quick), (many, slow) = points
        bandwidth = (many - few) / max(slow - quick, 1e-9)
        latency = max(quick - few / bandwidth, 1e-7) / hops(kind, ranks)
        if ranks > per_node:
            bandwidth *= crossing(kind, ranks, per_node)
        found[kind] = (bandwidth, latency)
    return found


def _collective(
    kind: str, x: torch.Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> Callable[[], Any]:
    """A call of it, on ``x`` in every rank."""
    how: dict[str, Any] = {"group": group, "async_op": async_op}
    if kind == "all_reduce":
        return lambda: dist.all_reduce(x, **how)
    if kind == "all_gather":
        y = torch.empty(group.size() * x.numel(), dtype=x.dtype, device=x.device)
        return lambda: dist.all_gather_into_tensor(y, x, **how)
    if kind == "reduce_scatter":
        y = x.new_empty(x.numel() // group.size())
        return lambda: dist.reduce_scatter_tensor(y, x[: y.numel() * group.size()], **how)
    y = torch.empty_like(x)
    return lambda: dist.all_to_all_single(y, x, **how)


def _cpu_seconds(work: Callable[[], Any]) -> float:
    """Shortest of some runs on the slowest rank, after one to warm up; every rank starts at once.

    Ranks that share cores are slow together: what one of them gets alone says nothing of a step.
    """
    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return _slowest(taken[1:], "cpu")


def _gpu_seconds(work: Callable[[], Any]) -> float:
    """The same, by the GPU's own clock."""
    taken = []
    for _ in range(REPEATS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return _slowest(taken[1:], "cuda")


def _slowest(taken: list[float], device: str) -> float:
    """The shortest run, each as long as its slowest rank took."""
    runs = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(runs, op=dist.ReduceOp.MAX)
    return float(runs.min())


def write(measured: Measured, out: Path) -> None:
    """Write the hardware file."""
    source = f"measured by helix calibrate with torch {torch.__version__}"
    note = "; ".join(
        f"{level} {kind} {each / 1e9:.3g} GB/s, {hop * 1e6:.3g} us a hop"
        for level, kinds in measured["links"].items()
        for kind, (each, hop) in kinds.items()
    )

    def quantity(value: float, unit: str, scale: float) -> dict[str, Any]:
        return {"value": float(f"{value / scale:.4g}"), "unit": unit, "source": source}

    def pace(each: tuple[float, ...]) -> dict[str, Any]:
        bandwidth, latency = each
        return {
            "bandwidth": quantity(bandwidth, "GB/s", 1e9),
            "latency": quantity(latency, "us", 1e-6),
        }

    def link(kinds: dict[str, tuple[float, float]]) -> dict[str, Any]:
        middle = tuple(statistics.median(each[i] for each in kinds.values()) for i in (0, 1))
        apart = {kind: pace(each) for kind, each in kinds.items()}
        return {**pace(middle), "kinds": apart}

    beside = {moved: {**each, "source": source} for moved, each in measured["beside"].items()}
    if replicas := beside.get("replicas"):
        beside["keys"] = {**replicas, "source": "assumption; as replicas"}
    document = {
        "name": measured["name"],
        "devices": measured["ranks"],
        "devices_per_node": measured["devices_per_node"],
        "gemm": quantity(measured["gemm"], "GFLOP/s", 1e9),
        "memory": quantity(measured["memory"], "GB", 1e9),
        "memory_bandwidth": quantity(measured["copied"], "GB/s", 1e9),
        **{level: link(kinds) for level, kinds in measured["links"].items()},
        "element_bytes": measured["element_bytes"],
        "beside": beside,
        **hopper.of_whole_steps(measured["name"]),
        "core_attention": measured["core_attention"],
        "note": note,
    }
    if host := measured.get("host"):
        document["host"] = {each: quantity(taken, "us", 1e-6) for each, taken in host.items()}
    files.write(out, yaml.safe_dump(document, sort_keys=False, width=100))


def summary(out: Path) -> str:
    """One line that says what a hardware file that was measured holds."""
    document = yaml.safe_load(out.read_text())
    return f"{document['name']}: GEMM {document['gemm']['value']:,.0f} GFLOP/s; {document['note']}"


def main() -> None:
    """One rank of torchrun's, on its GPU."""
    parser = argparse.ArgumentParser(description="Measure GPUs and links.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    signals.end_with_torchrun()
    with errors.told():
        prepare(out)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    measured = measure("cuda", int(os.environ["LOCAL_WORLD_SIZE"]))
    if dist.get_rank() == 0:
        write(measured, out)
        print(f"{out}: {summary(out)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

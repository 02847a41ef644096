"""Layouts of several GPUs, as one GPU sees them: rank 0 of each, alone, beside a stand-in for NCCL.

    python benchmarks/one_rank/run.py configs/experiments/two_gpus_rivals.yaml dense_8192 \
        dp2 megatron_fsdp helix_2x1_weights --profile

Every collective is one kernel (``nccl.cu``) that keeps SMs busy for as long as its bytes take over
the link of the experiment's ``hardware``. What is measured: the kernels of a rank, their time and
their memory. What is modelled: links, at their calibrated rate, of ranks that never wait for each
other. Losses mean nothing. Needs one GPU, TransformerEngine and nvcc; how near it comes, and what
it cannot say, is in docs/measuring.md.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from megatron_helix.basics import errors
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, torchrun
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.machine.hardware import Link
from megatron_helix.options import environment
from megatron_helix.recording import kernels

HERE = Path(__file__).parent
Phase = Literal["train", "prefill"]
RATES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
WARM = 3  # first steps, which allocate and choose kernels
MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
MB = re.compile(r"max allocated: ([0-9.]+)")
FLAGS = ("--log-interval", "1", "--log-memory-to-tensorboard", "--disable-gloo-process-groups")
FLAGS += ("--no-check-for-nan-in-loss-and-grad",)


@dataclass(frozen=True)
class Row:
    """What rank 0 of a layout took: median milliseconds a step, GB, milliseconds by kind."""

    ms: float | None = None
    gb: float | None = None
    kinds: dict[str, float] = field(default_factory=dict)


def main(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    model: Annotated[str, typer.Argument(help="One of its models, by name.")],
    layouts: Annotated[list[str], typer.Argument(help="Some of its layouts, by name.")],
    steps: Annotated[int, typer.Option(min=WARM + 3)] = 9,
    phase: Annotated[Phase, typer.Option(help="prefill: forward passes alone.")] = "train",
    profile: Annotated[bool, typer.Option("--profile", help="Sum up kernels by kind.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for logs and traces.")] = Path("runs/one_rank"),
) -> None:
    """Run rank 0 of each layout, one after the other, and print a table."""
    with errors.told():
        chosen = config.load(experiment)
        if chosen.hardware is None:
            raise UserError(f"{experiment}: hardware must be given, since it has the links' rates")
        commands = {name: torchrun.command(chosen, model, name) for name in layouts}
        out.mkdir(parents=True, exist_ok=True)
        library = build(Path(tempfile.mkdtemp()))
    rows = []
    for name, words in commands.items():
        rows.append(turn(chosen, words, out / f"{name}-{phase}", library, steps, phase, profile))
        print(json.dumps({"layout": name, "phase": phase, **asdict(rows[-1])}), flush=True)
    Console(width=120).print(table(layouts, rows, phase))
    if any(row.ms is None for row in rows):
        sys.exit(1)


def build(folder: Path) -> Path:
    """Compile the stand-in.

    Raises:
        UserError: without nvcc, NCCL's header or a GPU of Hopper's kind to compile for.
    """
    import torch
    from nvidia import nccl  # pyright: ignore[reportAttributeAccessIssue]

    if not torch.cuda.is_available():
        raise UserError("benchmarks/one_rank: needs a GPU, and torch sees none")
    major, minor = torch.cuda.get_device_capability()
    library = folder / "libstandin.so"
    words = [
        "nvcc",
        "-O2",
        "-std=c++17",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        f"-arch=sm_{major}{minor}",
    ]
    words += [f"-I{next(iter(nccl.__path__))}/include", str(HERE / "nccl.cu"), "-o", str(library)]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"benchmarks/one_rank: nvcc could not compile nccl.cu: {error}") from None
    return library


def turn(
    experiment: ExperimentConfig,
    words: list[str],
    folder: Path,
    library: Path,
    steps: int,
    phase: Phase,
    profile: bool,
) -> Row:
    """Milliseconds a step (median), GB, and kernels by kind of one layout's rank 0."""
    folder.mkdir(exist_ok=True)
    flags = [*torchrun.flags(words), *FLAGS, "--train-iters", str(steps)]
    if phase != "train":  # which the ledger's hook makes of a step
        flags += ["--helix-phase", phase, "--helix-metrics", str(folder / "metrics")]
    if profile:
        flags += ["--profile", "--use-pytorch-profiler", "--profile-ranks", "0"]
        flags += ["--profile-step-start", str(steps - 2), "--profile-step-end", str(steps - 1)]
        flags += ["--tensorboard-dir", str(folder)]
    assert experiment.hardware is not None
    given = {
        **os.environ,
        **environment.needed(words, {}),
        **link_rates(experiment.hardware.intra_node),
        "WORLD_SIZE": str(experiment.world_size),
        "LD_PRELOAD": str(library),
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }
    log = folder / "log.txt"
    with log.open("w") as text:
        command = [sys.executable, str(HERE / "rank.py"), *flags]
        failed = subprocess.run(command, stdout=text, stderr=text, env=given).returncode
    said = log.read_text(errors="replace")
    last = steps - 2 if profile else steps
    ms = [float(found) for found in MS.findall(said)][WARM:last]
    if failed or not ms:
        print(f"{log}: failed with {failed}: {said[-600:]}", file=sys.stderr)
        return Row()
    traces = list(folder.glob("**/rank-0.json.gz")) if profile else []
    kinds = kernels.read(traces[0]).kinds if traces else {}
    gb = max((float(found) for found in MB.findall(said)), default=0.0) / 1e3
    sums = {kind: round(found.ms, 1) for kind, found in kinds.items()}
    return Row(statistics.median(ms), gb, sums)


def link_rates(link: Link | None) -> dict[str, str]:
    """The environment that tells ``nccl.cu`` how fast each kind of collective is.

    Raises:
        UserError: without a link inside a node.
    """
    if link is None:
        raise UserError("hardware: intra_node must be given, since it has the links' rates")
    rates = {kind: link.of(kind).bandwidth.rate / 1e9 for kind in RATES}
    return {f"ONE_RANK_{kind.upper()}_GBPS": f"{rate:g}" for kind, rate in rates.items()}


def table(layouts: list[str], rows: list[Row], phase: Phase) -> Table:
    """One line a layout."""
    shown = Table(title=f"{phase}, one rank alone, links modelled", title_justify="left")
    kinds = [kind for kind in kernels.KINDS if any(kind in row.kinds for row in rows)]
    for heading in ("layout", "ms a step", "GB", *kinds):
        shown.add_column(heading, justify="left" if heading == "layout" else "right")
    for name, row in zip(layouts, rows, strict=True):
        cells = [row.ms, row.gb, *(row.kinds.get(kind) for kind in kinds)]
        shown.add_row(name, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return shown


if __name__ == "__main__":
    typer.run(main)

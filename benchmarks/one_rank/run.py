"""Layouts of several GPUs, as one GPU sees them: rank 0 of each, alone, beside a stand-in for NCCL.

    python benchmarks/one_rank/run.py configs/experiments/two_gpus_rivals.yaml dense_8192 \
        tp2 dp2 helix_2x1_weights --profile

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
AHEAD = 2  # turns whose rank imports while one runs
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
    """Run rank 0 of each layout, one after the other, and print a table.

    The next ones import while one has the GPU.
    """
    with errors.told():
        chosen = config.load(experiment)
        if chosen.hardware is None:
            raise UserError(f"{experiment}: hardware must be given, since it has the links' rates")
        commands = {name: torchrun.command(chosen, model, name) for name in layouts}
        out.mkdir(parents=True, exist_ok=True)
        library = build(Path(tempfile.mkdtemp()))
    turns = [
        Turn(name, out / f"{name}-{phase}", steps, profile, flags(words, steps, phase))
        for name, words in commands.items()
    ]
    rows = []
    try:
        for at, turn in enumerate(turns):
            for begun in turns[at : at + 1 + AHEAD]:
                begun.begin(rank_environment(chosen, commands[begun.name], library))
            rows.append(turn.row())
            print(json.dumps({"layout": turn.name, "phase": phase, **asdict(rows[-1])}), flush=True)
    finally:
        for turn in turns:
            turn.stop()
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


def flags(words: list[str], steps: int, phase: Phase) -> list[str]:
    """Those of a layout's rank, of the words of its command."""
    own = [*torchrun.flags(words), *FLAGS, "--train-iters", str(steps)]
    return own if phase == "train" else [*own, "--helix-phase", phase]


def rank_environment(
    experiment: ExperimentConfig, words: list[str], library: Path
) -> dict[str, str]:
    """What a layout's rank needs beside what there is."""
    assert experiment.hardware is not None
    return {
        **environment.needed(words, {}),
        **link_rates(experiment.hardware.intra_node),
        "WORLD_SIZE": str(experiment.world_size),
        "LD_PRELOAD": str(library),
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }


@dataclass
class Turn:
    """Rank 0 of one layout: a process that waits, its imports done, until its row is asked for."""

    name: str
    folder: Path
    steps: int
    profile: bool
    flags: list[str]
    _process: subprocess.Popen[bytes] | None = None

    def begin(self, given: dict[str, str]) -> None:
        """Start the process, unless it has been started."""
        if self._process is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._gate.unlink(missing_ok=True)
        words = [*self.flags]
        if "--helix-phase" in words:  # which the ledger's hook makes of a step
            words += ["--helix-metrics", str(self.folder / "metrics")]
        if self.profile:
            words += ["--profile", "--use-pytorch-profiler", "--profile-ranks", "0"]
            words += ["--profile-step-start", str(self.steps - 2)]
            words += ["--profile-step-end", str(self.steps - 1)]
            # Megatron writes traces beside that folder.
            words += ["--tensorboard-dir", str(self.folder / "tensorboard")]
        with self._log.open("w") as text:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "rank.py"), *words],
                stdout=text,
                stderr=text,
                env={**os.environ, **given, "ONE_RANK_GATE": str(self._gate)},
            )

    def row(self) -> Row:
        """Let it train to its end: median milliseconds a step, GB, and kernels by kind."""
        assert self._process is not None
        self._gate.touch()
        failed = self._process.wait()
        said = self._log.read_text(errors="replace")
        last = self.steps - 2 if self.profile else self.steps
        ms = [float(found) for found in MS.findall(said)][WARM:last]
        if failed or not ms:
            print(f"{self._log}: failed with {failed}: {said[-600:]}", file=sys.stderr)
            return Row()
        traces = list(self.folder.glob("**/rank-0.json.gz")) if self.profile else []
        kinds = kernels.read(traces[0]).kinds if traces else {}
        gb = max((float(found) for found in MB.findall(said)), default=0.0) / 1e3
        sums = {kind: round(found.ms, 1) for kind, found in kinds.items()}
        return Row(statistics.median(ms), gb, sums)

    def stop(self) -> None:
        """End a process that still waits."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    @property
    def _gate(self) -> Path:
        return self.folder / "go"

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"


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

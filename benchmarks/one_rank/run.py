"""Layouts of several GPUs, as one GPU sees them: a rank of each, alone, beside a stand-in for NCCL.

    python benchmarks/one_rank/run.py configs/experiments/two_gpus_rivals.yaml dense_8192 \
        tp2 dp2 helix_2x1_weights --profile
    python benchmarks/one_rank/run.py configs/experiments/two_gpus_packed.yaml qwen_8 \
        dp2 helix_2x1_step --ranks 0,1

Every collective is one kernel (``nccl.cu``) that keeps SMs busy for as long as its bytes take over
the link of the experiment's ``hardware``. What is measured: the kernels of a rank, their time and
their memory. What is modelled: links, at their calibrated rate, of ranks that never wait for each
other. Where ranks have unlike work (packed rows), ``--ranks`` runs several, one after the other,
and a step takes as long as on the slowest of them. Losses mean nothing. Needs one GPU,
TransformerEngine and nvcc; how near it comes, and what it cannot say, is in docs/measuring.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer
from reshaping import reshaped
from rich.console import Console
from rich.table import Table
from turn import WARM, Taken, Turn

from megatron_helix.basics import errors
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, runs, torchrun
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.machine.quantities import Link
from megatron_helix.options import environment
from megatron_helix.recording import kernels

HERE = Path(__file__).parent
Phase = Literal["train", "prefill"]
RATES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
AHEAD = 2  # turns whose rank imports while one runs
FLAGS = ("--log-interval", "1", "--log-memory-to-tensorboard", "--disable-gloo-process-groups")
FLAGS += ("--no-check-for-nan-in-loss-and-grad",)


@dataclass(frozen=True)
class Row:
    """What a layout took: median milliseconds a step, GB, milliseconds by kind of kernel.

    Of several ranks each step is the slowest one's, memory is the largest, and kinds are those of
    the rank with the longest median. Nothing where a rank failed.
    """

    ms: float | None = None
    gb: float | None = None
    kinds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, ranks: list[Taken | None]) -> "Row":
        """The row of ranks that ran one after the other."""
        taken = [one for one in ranks if one is not None]
        if len(taken) < len(ranks):
            return cls()
        steps = [max(step) for step in zip(*(one.steps for one in taken), strict=True)]
        slowest = max(taken, key=lambda one: statistics.median(one.steps))
        return cls(statistics.median(steps), max(one.gb for one in taken), slowest.kinds)


def main(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    model: Annotated[str, typer.Argument(help="One of its models, by name.")],
    layouts: Annotated[list[str], typer.Argument(help="Some of its layouts, by name.")],
    ranks: Annotated[str, typer.Option(help="Which to run, one after the other: 0,1.")] = "0",
    steps: Annotated[int, typer.Option(min=WARM + 3)] = 9,
    phase: Annotated[Phase, typer.Option(help="prefill: forward passes alone.")] = "train",
    layers: Annotated[int | None, typer.Option(min=1, help="Other than the model's.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Of a global batch.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens of each.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Of all layouts.")] = None,
    more: Annotated[str, typer.Option("--flags", help="More flags for every run.")] = "",
    profile: Annotated[bool, typer.Option("--profile", help="Sum up kernels by kind.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for logs and traces.")] = Path("runs/one_rank"),
) -> None:
    """Run the ranks of each layout, one after the other, and print a table.

    The next ones import while one has the GPU.
    """
    console = Console(width=120)
    with errors.told():
        chosen = config.load(experiment)
        if chosen.hardware is None:
            raise UserError(f"{experiment}: hardware must be given, since it has the links' rates")
        sizes = {"layers": layers, "sequences": sequences, "sequence_length": sequence_length}
        chosen = chosen.model_copy(
            update={
                **reshaped(chosen.models, chosen.batch, **sizes),
                "layouts": [
                    one.model_copy(update={"micro_batch": micro_batch or one.micro_batch})
                    for one in chosen.layouts
                ],
            }
        )
        asked = ranks_of(ranks, chosen.world_size)

        def commands(data: str | None = None) -> dict[str, list[str]]:
            given = {"data": data, "more": more.split()}
            return {name: torchrun.command(chosen, model, name, **given) for name in layouts}

        commands()  # what cannot run is refused before anything is made
        out.mkdir(parents=True, exist_ok=True)
        library = build(Path(tempfile.mkdtemp()))
        words = commands(str(runs.dataset(chosen, out, console)))
    turns = [
        Turn(
            name=name,
            rank=rank,
            folder=out / f"{name}-{phase}-rank{rank}",
            steps=steps,
            profile=profile,
            flags=flags(words[name], steps, phase),
        )
        for name in layouts
        for rank in asked
    ]
    taken: dict[str, list[Taken | None]] = {name: [] for name in layouts}
    rows = []
    try:
        for at, turn in enumerate(turns):
            for begun in turns[at : at + 1 + AHEAD]:
                begun.begin(rank_environment(chosen, words[begun.name], library))
            taken[turn.name].append(turn.taken())
            if len(taken[turn.name]) == len(asked):
                rows.append(Row.of(taken[turn.name]))
                said = {"layout": turn.name, "phase": phase, "ranks": asked, **asdict(rows[-1])}
                print(json.dumps(said), flush=True)
    finally:
        for turn in turns:
            turn.stop()
    console.print(title(chosen, asked, phase, more), soft_wrap=True, highlight=False)
    console.print(table(layouts, rows))
    if any(row.ms is None for row in rows):
        sys.exit(1)


def ranks_of(said: str, world_size: int) -> list[int]:
    """The ranks that ``--ranks`` names.

    Raises:
        UserError: for what is none of the experiment's ranks.
    """
    words = said.split(",")
    if not all(word.isdecimal() and int(word) < world_size for word in words):
        raise UserError(
            f"--ranks: must be numbers below the experiment's world_size ({world_size}), with"
            f" commas between them, got {said!r}; correct it"
        )
    return sorted({int(word) for word in words})


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


def link_rates(link: Link | None) -> dict[str, str]:
    """The environment that tells ``nccl.cu`` how fast each kind of collective is.

    Raises:
        UserError: without a link inside a node.
    """
    if link is None:
        raise UserError("hardware: intra_node must be given, since it has the links' rates")
    rates = {kind: link.of(kind).bandwidth.rate / 1e9 for kind in RATES}
    return {f"ONE_RANK_{kind.upper()}_GBPS": f"{rate:g}" for kind, rate in rates.items()}


def title(chosen: ExperimentConfig, ranks: list[int], phase: Phase, more: str) -> str:
    """What a table is of."""
    which = ", ".join(map(str, ranks))
    batch, layers = chosen.batch, chosen.models[0].num_layers
    shape = f"{layers} layers, {batch.sequences} x {batch.sequence_length} tokens {more}".rstrip()
    return f"{phase}, one rank alone ({which}), links modelled: {shape}"


def table(layouts: list[str], rows: list[Row]) -> Table:
    """One line a layout."""
    shown = Table()
    kinds = [kind for kind in kernels.KINDS if any(kind in row.kinds for row in rows)]
    for heading in ("layout", "ms a step", "GB", *kinds):
        shown.add_column(heading, justify="left" if heading == "layout" else "right")
    for name, row in zip(layouts, rows, strict=True):
        cells = [row.ms, row.gb, *(row.kinds.get(kind) for kind in kinds)]
        shown.add_row(name, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return shown


if __name__ == "__main__":
    typer.run(main)

"""GPU code between two ranks on one GPU, held against stock's: numbers, no times.

    python benchmarks/one_gpu_parity.py sequence --out runs/one_gpu_parity
    python benchmarks/one_gpu_parity.py packed --device cpu

NCCL takes the ranks for those of two hosts (``NCCL_HOSTID``). The sets, their models small:

* ``fp8``: FP8 by each recipe, 50 steps; the mean distance of losses to those of stock TP=2 in bf16
  is at most 1.5 times that of stock in FP8, and no step is skipped;
* ``packed``: packed rows in bf16, documents and conversations; the distance to single precision is
  at most 1.5 times the larger one of stock's on two ranks and on one;
* ``batch``: the same of rows of one document under the batch split, by every way to gather weights;
* ``sequence``: the same under the sequence split, gap by gap;
* ``graphs``: under CUDA graphs losses and norms are those without, to the last bit.

Runs of these three are recorded, their last steps profiled, as those of an experiment are. Needs a
GPU and TransformerEngine; docs/exactness.md has what one H200 gave. ``--device cpu`` rehearses the
three over gloo.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from matrix_turns import Device
from one_gpu_sets import DETERMINISTIC, Bench, trainings
from one_gpu_turns import Curve, curves
from one_gpu_verdicts import rows
from rich.console import Console
from rich.table import Table

from megatron_helix.basics import errors, files
from megatron_helix.experiment.execution import commit


def main(
    name: Annotated[str, typer.Argument(metavar="SET", help="fp8, packed, sequence, ...")],
    out: Annotated[Path, typer.Option(help="Folder of logs, checkpoints and results.json.")] = (
        Path("runs/one_gpu_parity")
    ),
    device: Annotated[Device, typer.Option(help="cpu rehearses.")] = "cuda",
    steps: Annotated[int | None, typer.Option(min=2, help="Of a run; else the set's.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which runs are ended.")] = 600,
) -> None:
    """Train what the set compares; exit code 1 where a bar is missed."""
    import torch

    console = Console(width=120)
    with errors.told():
        folder = out / name
        planned = trainings(name, Bench(folder, device, steps, console))
        if name in DETERMINISTIC:
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        found: dict[str, Curve] = {}
        for training, curve in curves(planned, device, limit):
            found[training.name] = curve
            last = f"last loss {curve.losses[-1]:.4f}" if curve.losses else ""
            console.print(training.name, curve.failed or last)
    said = [*rows(name, found, device)]
    results = {
        **{"set": name, "source": "measured", "torch": torch.__version__, "commit": commit()},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{"rows": said, "curves": {each: asdict(curve) for each, curve in found.items()}},
    }
    files.write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    console.print(table(name, said))
    raise typer.Exit(int(not all(row["good"] for row in said)))


def table(name: str, said: list[dict[str, Any]]) -> Table:
    """One line a comparison."""
    headings = list(dict.fromkeys(key for row in said for key in row))
    shown = Table(*headings, title=f"{name}: two ranks on one GPU", title_justify="left")
    for row in said:
        shown.add_row(*(_cell(row.get(heading)) for heading in headings))
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    typer.run(main)

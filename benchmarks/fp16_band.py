"""Training in fp16: another core attention leaves the unfused one by no more than rounding does.

    python benchmarks/fp16_band.py --out runs/fp16_band
    python benchmarks/fp16_band.py --device cpu --out runs/fp16_tried

One rank trains the source's dense model for 20 steps, always from the same weights and on the same
text: with the layer spec's core attention, TransformerEngine's unfused one at a head dimension of
512; with the same in other roundings; and with ``--core``.

**The band.** Runs that are equal on paper and round differently are apart, and rounding is all that
sets them apart: micro-batches of a half and a quarter, whose gradients are sums of more parts, and
Megatron's own unfused kernels. The largest distance between any two of these, relative, at any
step, is what unfused fp16 leaves open. A core attention that rounds as well is one more run among
them: as far from the first as they are from each other. Of equals any one may be the farthest, so
it may be twice as far. In the loss it may never be farther than four unit roundoffs of fp16, the
band in which experiments ask fp16 to be of fp32 (``Fp16Config``).

Exit code 1 when loss or gradient norm leave the band at any step, when a step is skipped, or when
the runs do not take place. docs/exactness.md has what one H200 gave. ``--device cpu`` rehearses
with a tiny model, in minutes; the layer spec's core attention is Megatron's own there, and the last
arm has only its softmax in fp32.
"""

import json
import time
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import matrix_asked
import typer
from matrix_turns import LAUNCHER, Bench, Device, Turn, one_by_one
from rich.console import Console
from rich.table import Table

from megatron_helix.experiment import metrics, results, runs
from megatron_helix.experiment.config import ExperimentConfig, Fp16Config, VerificationConfig
from megatron_helix.experiment.execution import commit
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.core_attention import CoreAttention
from megatron_helix.run_config.layout import LayoutConfig

SEQUENCES = 4
FIRST = "unfused_mb4"
MEGATRON = "megatron_mb4"
NO_WORSE = 2.0  # than what sets the unfused runs apart
KEYS = ("loss", "grad_norm")
MOST = {"loss": Fp16Config().band}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs and of results.json.")],
    device: Annotated[Device, typer.Option(help="cpu rehearses.")] = "cuda",
    core: Annotated[CoreAttention, typer.Option(help="What is held against the band.")] = "prefix",
    steps: Annotated[int, typer.Option(min=2)] = 20,
) -> None:
    """Train, compare, print a table."""
    console = Console(width=120)
    data = runs.corpus_dataset(out, console)
    ends = time.monotonic() + 1e9
    bench = Bench(out=out, gpus=1, device=device, data=data, flags=(), profile=False, ends=ends)
    found: dict[str, metrics.RunMetrics] = {}
    for turn, outcome in one_by_one(bench, _turns(out, device, core, steps), lambda _: True):
        name = turn.run.layout.name
        if isinstance(outcome, str):
            console.print(f"{name}: {outcome}")
        else:
            found[name] = outcome
            console.print(f"{name}: {outcome.step_ms:.1f} ms a step, loss {outcome.losses[-1]:.5f}")
    said = judged(found, f"{core}_mb4")
    console.print(_table(found, said))
    curves = {name: [run.losses, run.grad_norms] for name, run in found.items()}
    said |= {"commit": commit(), "device": device, "source": "measured", "curves": curves}
    (out / "results.json").write_text(json.dumps(said, indent=1) + "\n")
    raise typer.Exit(int(not said["within"]))


def _turns(out: Path, device: Device, core: CoreAttention, steps: int) -> list[Turn]:
    arms: list[tuple[str, CoreAttention, int]] = [
        (FIRST, "spec", 4),
        (f"{core}_mb4", core, 4),
        ("unfused_mb2", "spec", 2),
        ("unfused_mb1", "spec", 1),
        (MEGATRON, "prefix", 4),  # which is Megatron's own in fp16_band_rank.py
    ]
    layouts = [
        LayoutConfig(name=name, tp=1, micro_batch=size, core_attention=kind)
        for name, kind, size in arms
    ]
    model = matrix_asked.SHAPES["seed" if device == "cuda" else "tiny"][0]
    experiment = ExperimentConfig(
        name="fp16_band",
        models=[model],
        layouts=layouts,
        world_size=1,
        batch=BatchConfig(sequences=SEQUENCES, sequence_length=2048 if device == "cuda" else 32),
        steps=steps,
        learning_rate=1e-4,
        device=device,
        launcher=LAUNCHER,
        precision="fp16",
        flags=("--attention-backend", "unfused") if device == "cuda" else (),
        verification=VerificationConfig(fp16=Fp16Config(loss_scale=4096)),  # nothing overflows
    )
    own = ("--no-masked-softmax-fusion", "--attention-softmax-in-fp32")
    return [
        Turn(
            experiment=experiment,
            run=runs.Run(model=model, layout=layout, phase="train", precision="fp16"),
            folder=out / layout.name,
            more=own if layout.name == MEGATRON else (),
            module="fp16_band_rank" if layout.name == MEGATRON else "gated",
        )
        for layout in layouts
    ]


def judged(found: Mapping[str, metrics.RunMetrics], name: str) -> dict[str, Any]:
    """The band and how far the run ``name`` is from the first one.

    Returns:
        ``within``; by ``loss`` and ``grad_norm`` the ``band`` and what is ``apart``; ``skipped``.
    """
    unfused = [run for key, run in found.items() if key != name]
    if FIRST not in found or name not in found or len(unfused) < 3:
        return {"within": False}
    said: dict[str, Any] = {"skipped": sum(run.skipped_steps for run in found.values())}
    for key in KEYS:
        spread = max(_apart(a, b, key) for a, b in combinations(unfused, 2))
        band = min(NO_WORSE * spread, MOST.get(key, float("inf")))
        said[key] = {"band": band, "apart": _apart(found[name], found[FIRST], key)}
    said["within"] = not said["skipped"] and all(
        said[key]["apart"] <= said[key]["band"] for key in KEYS
    )
    return said


def _apart(one: metrics.RunMetrics, other: metrics.RunMetrics, key: str) -> float:
    """The largest relative distance at any step."""
    if key == "loss":
        return results.largest_difference(one.losses, other.losses)
    norms = [[norm for norm in run.grad_norms if norm is not None] for run in (one, other)]
    return results.largest_difference(*norms)


def _table(found: Mapping[str, metrics.RunMetrics], said: dict[str, Any]) -> Table:
    made = Table(title=f"fp16, {'within the band' if said['within'] else 'OUTSIDE the band'}")
    for heading in ("run", *(f"{key} apart" for key in KEYS), "last loss", "step ms"):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    for name, run in found.items():
        apart = [f"{_apart(run, found[FIRST], key):.1e}" if FIRST in found else "-" for key in KEYS]
        made.add_row(name, *apart, f"{run.losses[-1]:.5f}", f"{run.step_ms:.1f}")
    if "loss" in said:
        made.add_row("band", *(f"{said[key]['band']:.1e}" for key in KEYS))
    return made


if __name__ == "__main__":
    typer.run(main)

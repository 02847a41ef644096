"""Layouts side by side on the GPUs of one machine: exactness, then TPS and exposed communication.

    python benchmarks/gpu_matrix.py --gpus 2 --out runs/gpu
    python benchmarks/gpu_matrix.py --gpus 4 --device cpu --shape tiny --steps 3 --out runs/tried
    python benchmarks/gpu_matrix.py --experiment configs/experiments/two_gpus_qwen.yaml \
        --parts prefill --only dp2,megatron_fsdp,helix_2x1_weights --out runs/qwen

Its parts are *parity* (``matrix_parity.py``), *train* and *prefill* (``matrix_timing.py``) and
*decode* (``matrix_decode.py``): stock layouts, their rivals and helix in turns, the layer shape of
the source experiment, each layout at several micro-batches. A turn is a run of its own of
Megatron's loop. Torch FSDP2, which has no fp16 in Megatron, runs with ``--precision bf16``. With
``--experiment`` models, layouts and all that no option says are a file's; ``--cores spec,auto``
gives each layout each core attention in turn.

A turn's files stay in OUT: a second call goes on where the first one ended. ``--limit`` ends a call
in time for its results to be written. Each timed layout draws weights of its own. An untrained
router loads experts unevenly, and every layout's differently: time MoE models with ``--flags
--moe-router-force-load-balancing``.
"""

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matrix_asked
import torch
import typer
from matrix_decode import decoding
from matrix_parity import parity
from matrix_timing import MFU, timing
from matrix_turns import LAUNCHER, Bench, Device
from one_rank.reshaping import reshaped
from rich.console import Console

from megatron_helix.basics import errors
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import runs
from megatron_helix.experiment.config import (
    DecodeConfig,
    ExperimentConfig,
    Fp16Config,
    VerificationConfig,
)
from megatron_helix.experiment.execution import commit
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.files import read_config, validated
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import Precision

PARTS = "parity,prefill,train,decode"
OF_FILES = "prefill,train"
# As in the rivals' tables: the check waits for the GPU at every bucket of gradients, which took 1.3
# to 1.5 % of a step of Qwen2.5-7B's layers.
TIMED = ("--no-check-for-nan-in-loss-and-grad",)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the turns and of results.json.")],
    gpus: Annotated[int | None, typer.Option(min=1, max=8, help="Or the file's.")] = None,
    device: Annotated[Device, typer.Option(help="cpu rehearses.")] = "cuda",
    experiment: Annotated[
        Path | None, typer.Option(help="A file (YAML), instead of a shape.")
    ] = None,
    shape: Annotated[str, typer.Option(help=", ".join(matrix_asked.SHAPES))] = "seed",
    parts: Annotated[
        str | None, typer.Option(help=f"Which, in this order: {PARTS}; of a file {OF_FILES}.")
    ] = None,
    models: Annotated[str, typer.Option(help="Names of models; all of the shape.")] = "",
    layers: Annotated[int | None, typer.Option(min=1, help="Other than the models'.")] = None,
    only: Annotated[
        str, typer.Option(help="Layouts of these names, or with these words in them.")
    ] = "",
    cores: Annotated[str, typer.Option(help="Core attentions, each layout with each.")] = "",
    sequences: Annotated[int | None, typer.Option(min=1, help="Of a global batch; 16.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="2048.")] = None,
    micro_batches: Annotated[
        str, typer.Option(help="Each layout tries these: 1,2,4,8,16, or the file's own.")
    ] = "",
    prompts: Annotated[int, typer.Option(help="Sequences that decode serves.")] = 1024,
    rounds: int = 2,
    steps: Annotated[int, typer.Option(min=2, help="Of a turn; the first warms up.")] = 11,
    precision: Annotated[Precision | None, typer.Option(help="fp16, or the file's.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="Predict for it, beside.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Of one GPU, for MFU.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which no turn begins.")] = 1e9,
    flags: Annotated[str, typer.Option(help="More flags for every run.")] = "",
    profile: Annotated[bool, typer.Option(help="The last step of a layout's last turn.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print flags of turns only.")] = False,
) -> None:
    """Run what is asked for; exit code 1 when a layout leaves the first one's losses."""
    asked = matrix_asked.of_file(experiment, device) if experiment else matrix_asked.of_shape(shape)
    gpus = gpus or asked.gpus
    if gpus is None:
        raise UserError("--gpus: must be given without --experiment, got none; say how many")
    known = OF_FILES if experiment else PARTS
    order = (parts or known).split(",")
    if set(order) - set(known.split(",")):
        raise UserError(f"--parts: must be some of {known}, got {parts}; leave the others away")
    asked = replace(
        asked,
        **reshaped(
            [one for one in asked.models if not models or one.name in models.split(",")],
            asked.batch,
            layers=layers,
            sequences=sequences,
            sequence_length=sequence_length,
        ),
    )
    sizes = [int(size) for size in micro_batches.split(",")] if micro_batches else []
    precision = precision or asked.precision
    common = {
        "world_size": gpus,
        "batch": asked.batch,
        "steps": steps,
        "learning_rate": 1e-4,
        "device": device,
        "launcher": LAUNCHER,
        "precision": precision,
        "verification": VerificationConfig(fp16=Fp16Config(loss_scale=4096)),  # nothing overflows
        "flags": asked.flags,
        "hardware": read_config(Hardware, hardware) if hardware else asked.hardware,
        "peak_tflops": peak_tflops or asked.peak_tflops,
    }

    def cell(part: str, model: ModelConfig) -> ExperimentConfig:
        arms = asked.arms(gpus, model, sizes, device, part)
        arms = [arm for arm in arms if arm.trains_in(precision)]
        named = matrix_asked.with_cores(
            matrix_asked.named(arms, only.split(",") if only else []),
            cores.split(",") if cores else [],
        )
        decodes = part == "decode"
        request = DecodeConfig(sequences=prompts, prompt_length=128, output_length=32)
        words = {"name": part, "phases": [part], "decode": request if decodes else None}
        document = {"models": [model], "layouts": named, **common, **words}
        return validated(ExperimentConfig, document, experiment or Path(shape))

    more = (*TIMED, *flags.split())
    if dry_run:
        for part in (one for one in order if one != "parity"):
            for model in asked.models:
                _show(cell(part, model), more)
        return
    console = Console(width=150)
    bench = Bench(
        out=out,
        gpus=gpus,
        device=device,
        data=runs.corpus_dataset(out, console),
        flags=more,
        profile=profile,
        ends=time.monotonic() + limit,
    )
    found: dict[str, Any] = {
        "gpus": gpus,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "source": "measured",
        "mfu": MFU,
    }
    exact = True
    for part in order:
        if part == "parity":
            found[part] = []
            for row in parity(bench, matrix_asked.SHAPES["tiny"], console):
                found[part].append(row)
                _write(out, found)  # a call that is killed keeps what is known
            exact = all(row["exact"] for row in found[part])
        for model in asked.models if part != "parity" else ():
            measure = decoding if part == "decode" else timing
            found[f"{part}-{model.name}"] = measure(bench, cell(part, model), rounds, console)
            _write(out, found)
        _write(out, found)
    raise typer.Exit(int(not exact))


def _show(experiment: ExperimentConfig, more: tuple[str, ...]) -> None:
    """A line for each turn that would be: its flags, checked as far as the planner can."""
    (model,), (phase,) = experiment.models, experiment.phases
    for layout in experiment.layouts:
        run = runs.Run(model=model, layout=layout, phase=phase, precision=experiment.precision)
        with runs.named(run):
            runs.deployment(experiment, run).check()
        words = shlex.join([*runs.layout_flags(experiment, run), *more])
        typer.echo(f"{phase} {model.name} {layout.name}: {words}")


def _write(out: Path, found: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with errors.told():
        typer.run(main)

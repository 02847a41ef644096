"""One run of an experiment: start its ranks, wait for them, put together what they measured."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import megatron_helix
from megatron_helix import samples
from megatron_helix.basics import files
from megatron_helix.experiment import decode, metrics, runs, vocabulary
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.progress import Steps
from megatron_helix.experiment.runs import Run
from megatron_helix.launching import launchers
from megatron_helix.planner.flops import of_model

Poll = Callable[[int], None]


def execute(
    experiment: ExperimentConfig, one: Run, out: Path, prefix: Path, poll: Poll | None
) -> tuple[dict[str, Any], list[Path]]:
    """Run it now.

    Args:
        experiment: that the run is of.
        one: the run.
        out: folder of the experiment.
        prefix: of the dataset.
        poll: called now and then with the number of steps done; None where nobody asks.

    Returns:
        What was measured, and the files that hold it.
    """
    folder = runs.folder(out, one)
    shutil.rmtree(folder, ignore_errors=True)
    measure = _decoded if one.phase == "decode" else _trained
    result = {
        "name": one.name,
        "model": one.model.name,
        "layout": one.layout.name,
        "phase": one.phase,
        "precision": one.precision,
        "world_size": experiment.world_size,
        **measure(experiment, one, out, prefix, poll and Steps(folder / "metrics", poll)),
        "device": experiment.device,
        "source": "measured",
        "commit": commit(),
    }
    kept = folder / "result.json"
    files.write(kept, json.dumps(result, indent=2))
    measured = [files.of_ranks(folder / "metrics", ending) for ending in (".jsonl", ".json")]
    return result, [kept, *chain(*measured)]


def _trained(
    experiment: ExperimentConfig, one: Run, out: Path, prefix: Path, steps: Steps | None
) -> dict[str, Any]:
    """What a run of Megatron's loop measured."""
    folder = runs.folder(out, one)
    flags = runs.run_flags(experiment, one, prefix, out)
    if not one.is_check:
        flags.append("--helix-profile")
    launchers.launch(
        experiment.launcher,
        flags,
        experiment.world_size,
        folder / "logs",
        steps,
    )
    measured = asdict(metrics.read(folder / "metrics"))
    measured["samples"] = samples.read(folder / "metrics")
    # Written by the same code in a prefill, too, where there is no gradient to speak of.
    measured["grad_norms"] = [norm for norm in measured["grad_norms"] if norm is not None]
    return measured


def _decoded(
    experiment: ExperimentConfig, one: Run, out: Path, prefix: Path, steps: Steps | None
) -> dict[str, Any]:
    """What serving the experiment's request measured."""
    folder = runs.folder(out, one)
    prompts = folder / "prompts.txt"
    decode.write_prompts(experiment, one, prefix, prompts)
    program = decode.program(experiment, one, prompts, out)
    launchers.start(experiment.launcher, program, experiment.world_size, folder / "logs", steps)
    return decode.read(experiment, one, folder / "metrics")


def utilisation(experiment: ExperimentConfig, one: Run, step_ms: float) -> dict[str, float | None]:
    """What a device achieves in a step of a run, and what part of its peak that is (MFU)."""
    per_device = step_flops(experiment, one) / experiment.world_size / step_ms / 1e9
    mfu = per_device / experiment.peak_tflops if experiment.peak_tflops else None
    return {"tflops_per_device": per_device, "mfu": mfu}


def step_flops(experiment: ExperimentConfig, one: Run) -> float:
    """Operations of a step of a run; attention in full, as is usual for FLOPs utilisation."""
    tokens, keys = experiment.batch.tokens, experiment.counted_batch.keys
    rows = vocabulary.rows(experiment)
    flops = of_model(one.model, tokens=tokens, words=tokens, keys=keys, vocabulary=rows)
    return flops * (3 if one.phase == "train" else 1)


def commit() -> str:
    """The commit of this source tree, or the version where it is none."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return megatron_helix.__version__

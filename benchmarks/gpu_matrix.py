"""Layouts side by side on the GPUs of one machine: exactness, then TPS and exposed communication.

    python benchmarks/gpu_matrix.py --gpus 2 --out runs/gpu
    python benchmarks/gpu_matrix.py --gpus 4 --device cpu --shape tiny --steps 3 --out runs/tried

Its parts are *parity* (``matrix_parity.py``), *train* and *prefill* (``matrix_timing.py``) and
*decode* (``matrix_decode.py``): stock layouts, their rivals and helix in turns, the layer shape of
the source experiment, each layout at several micro-batches. A turn is a run of its own of
Megatron's loop. Torch FSDP2, which has no fp16 in Megatron, runs with ``--precision bf16``.

A turn's files stay in OUT: a second call goes on where the first one ended. ``--limit`` ends a call
in time for its results to be written. Each timed layout draws weights of its own. An untrained
router loads experts unevenly, and every layout's differently: time MoE models with ``--flags
--moe-router-force-load-balancing``.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matrix_decode import decoding
from matrix_parity import parity
from matrix_timing import timing
from matrix_turns import LAUNCHER, Bench, Device, layouts, rivals
from rich.console import Console

from megatron_helix.experiment import runs
from megatron_helix.experiment.config import (
    DecodeConfig,
    ExperimentConfig,
    Fp16Config,
    VerificationConfig,
)
from megatron_helix.experiment.execution import commit
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import Precision

TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "untie_embeddings_and_output_weights": True,  # as torch FSDP2 needs it
}
SEED: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 8192,
    "num_attention_heads": 16,
    "kv_channels": 512,
    "untie_embeddings_and_output_weights": True,
}
SHAPES = {
    "tiny": [
        ModelConfig(name="dense", ffn_hidden_size=1024, **TINY),
        ModelConfig(name="moe", ffn_hidden_size=256, num_experts=8, **TINY),
    ],
    "seed": [
        ModelConfig(name="dense", ffn_hidden_size=32768, **SEED),
        ModelConfig(name="moe", ffn_hidden_size=32768, num_experts=8, **SEED),
    ],
    # Adam's states of the 17 billion parameters of the source's MoE model need eight GPUs.
    "small-experts": [
        ModelConfig(name="dense", ffn_hidden_size=32768, **SEED),
        ModelConfig(name="moe_8192", ffn_hidden_size=8192, num_experts=8, **SEED),
    ],
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the turns and of results.json.")],
    gpus: Annotated[int, typer.Option(min=1, max=8)],
    device: Annotated[Device, typer.Option(help="cpu rehearses.")] = "cuda",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "seed",
    parts: Annotated[str, typer.Option(help="Which, in this order.")] = (
        "parity,prefill,train,decode"
    ),
    models: Annotated[str, typer.Option(help="Names of models; all of the shape.")] = "",
    only: Annotated[str, typer.Option(help="Layouts whose name has one of these words.")] = "",
    sequences: Annotated[int, typer.Option(help="Of a global batch.")] = 16,
    sequence_length: int = 2048,
    micro_batches: Annotated[str, typer.Option(help="Each layout tries these.")] = "1,2,4,8,16",
    prompts: Annotated[int, typer.Option(help="Sequences that decode serves.")] = 1024,
    rounds: int = 2,
    steps: Annotated[int, typer.Option(min=2, help="Of a turn; the first warms up.")] = 11,
    precision: Precision = "fp16",
    hardware: Annotated[Path | None, typer.Option(help="Predict for it, beside.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which no turn begins.")] = 1e9,
    flags: Annotated[str, typer.Option(help="More flags for every run.")] = "",
) -> None:
    """Run what is asked for; exit code 1 when a layout leaves the first one's losses."""
    console = Console(width=150)
    bench = Bench(
        out=out,
        gpus=gpus,
        device=device,
        data=runs.corpus_dataset(out, console),
        flags=tuple(flags.split()),
        ends=time.monotonic() + limit,
    )
    found: dict[str, Any] = {
        "gpus": gpus,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "source": "measured",
    }
    common = {
        "world_size": gpus,
        "batch": BatchConfig(sequences=sequences, sequence_length=sequence_length),
        "steps": steps,
        "learning_rate": 1e-4,
        "device": device,
        "launcher": LAUNCHER,
        "precision": precision,
        "verification": VerificationConfig(fp16=Fp16Config(loss_scale=4096)),  # nothing overflows
        "hardware": read_config(Hardware, hardware) if hardware else None,
    }
    sizes = [int(size) for size in micro_batches.split(",") if int(size) <= sequences]
    asked = [model for model in SHAPES[shape] if not models or model.name in models.split(",")]

    def experiment(part: str, model: ModelConfig) -> ExperimentConfig:
        decodes = part == "decode"  # which serves all sequences at once
        chosen = layouts(gpus, model, sizes[:1] if decodes else sizes)
        if not decodes:  # what is served has no data parallelism to shard anything
            beside = rivals(gpus, model, sizes, device)
            chosen += [item for item in beside if item.trains_in(precision)]
        named = [item for item in chosen if any(word in item.name for word in only.split(","))]
        request = DecodeConfig(sequences=prompts, prompt_length=128, output_length=32)
        words = {"name": part, "phases": [part], "decode": request if decodes else None}
        return ExperimentConfig(models=[model], layouts=named, **common, **words)

    exact = True
    for part in parts.split(","):
        if part == "parity":
            found[part] = []
            for row in parity(bench, SHAPES["tiny"], console):
                found[part].append(row)
                _write(out, found)  # a call that is killed keeps what is known
            exact = all(row["exact"] for row in found[part])
        for model in asked if part != "parity" else ():
            measure = decoding if part == "decode" else timing
            found[f"{part}-{model.name}"] = measure(bench, experiment(part, model), rounds, console)
            _write(out, found)
        _write(out, found)
    raise typer.Exit(int(not exact))


def _write(out: Path, found: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

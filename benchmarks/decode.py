"""Decode side by side: stock TP=8/PP=2 and TP=16 against helix, on 16 CPU ranks of this machine.

    python benchmarks/decode.py --model configs/models/tiny_dense.yaml --out runs/decode

All layouts serve the same request from the same checkpoint, which is made first: one stock step on
Megatron's mock data. What the times are worth is said in the README: on CPUs they show what a
layout sends and waits for, not which one is faster on GPUs. A layout's measurement is kept in
OUT/NAME, and done again by every call.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_helix import corpus, generate, pretrain_gpt
from megatron_helix.experiment.results import if_known
from megatron_helix.inference import measure
from megatron_helix.inference.requests import Request
from megatron_helix.inference.sampling import Sampling
from megatron_helix.launching import fork_ranks
from megatron_helix.run_config.files import read_mapping
from megatron_helix.run_config.model import ModelConfig

WORLD_SIZE = 16
SP = "--sequence-parallel"
# Flags, and the micro-batches that keep the pipeline's stages busy.
LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "tp8_pp2": (
        (SP, "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "2"),
        2,
    ),
    "tp16": ((SP, "--tensor-model-parallel-size", "16"), 1),
    "helix_4x4": ((SP, "--helix-m", "4", "--helix-n", "4"), 1),
    "helix_8x2": ((SP, "--helix-m", "8", "--helix-n", "2"), 1),
}


def main(
    model: Annotated[Path, typer.Option(help="A model file (YAML), dense.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the measurements.")],
    batch: Annotated[int, typer.Option(min=1)] = 16,
    prompt_length: Annotated[int, typer.Option(min=1)] = 64,
    output_length: Annotated[int, typer.Option(min=3)] = 16,
    layouts: Annotated[str, typer.Option(help="Names, with commas.")] = "tp8_pp2,tp16,helix_4x4",
) -> None:
    """Measure prefill and decode of every layout and print a table."""
    chosen = [name.strip() for name in layouts.split(",")]
    if unknown := set(chosen) - set(LAYOUTS):
        raise typer.BadParameter(f"--layouts: {', '.join(LAYOUTS)}, got {', '.join(unknown)}")
    config = ModelConfig.model_validate(read_mapping(model))
    checkpoint = _checkpoint(config, out, prompt_length + output_length)
    table = Table(title=f"{config.name}: {batch} x {prompt_length} + {output_length} tokens")
    table.caption = "times in ms; KV cache and bytes sent in a decode step: KiB a rank"
    for column in ("layout", "TTFT", "ITL", "p50", "p99", "TPOT", "tok/s", "KV", "sent"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for name in chosen:
        flags, microbatches = LAYOUTS[name]
        request = Request(
            prompts=("x" * prompt_length,) * batch,
            new_tokens=output_length,
            max_batch=batch,
            microbatches=microbatches,
        )
        job = generate.prepare(checkpoint, request, flags, WORLD_SIZE)
        fork_ranks.run(
            fork_ranks.Ranks(
                target=generate.measure,
                args=(job, Sampling(), out / name),
                world_size=WORLD_SIZE,
                logs=out / name / "logs",
            )
        )
        measured = measure.read(out / name)
        (out / name / "result.json").write_text(json.dumps(asdict(measured), indent=2))
        times = ("ttft_ms", "itl_ms", "itl_p50_ms", "itl_p99_ms", "tpot_ms", "tokens_per_s")
        table.add_row(
            name,
            *(if_known(getattr(measured, time), 0) for time in times),
            f"{max(measured.kv_bytes) / 1024:,.0f}",
            f"{sum(measured.sent_bytes.values()) / 1024:,.1f}",
        )
    Console().print(table)


def _checkpoint(config: ModelConfig, out: Path, positions: int) -> Path:
    """One step of one stock rank, saved: what every layout starts from."""
    folder = out / f"{config.name}-{positions}"
    if (folder / "latest_checkpointed_iteration.txt").exists():
        return folder
    flags = [
        *("--helix-device", "cpu", *config.flags(), *corpus.TOKENIZER_FLAGS, "--mock-data"),
        *("--make-vocab-size-divisible-by", "16", "--lr", "1e-3", "--train-iters", "1"),
        *("--seq-length", str(positions), "--max-position-embeddings", str(positions)),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--num-workers", "0"),
        *("--eval-iters", "0", "--eval-interval", "1000000"),
        *("--save", str(folder), "--save-interval", "1", "--no-save-optim", "--no-save-rng"),
    ]
    flags = pretrain_gpt.prepare(flags, 1)
    logs = out / "logs"
    fork_ranks.run(
        fork_ranks.Ranks(target=pretrain_gpt.train, args=(flags,), world_size=1, logs=logs)
    )
    return folder


if __name__ == "__main__":
    typer.run(main)

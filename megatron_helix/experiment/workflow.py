"""Run an experiment: the data, equal initial weights, every layout, and the comparison.

Each run keeps its result in a file of its own as soon as it is done. A second call with the same
experiment does only what is missing; a run whose flags changed is done again.
"""

import hashlib
import json
import shutil
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_helix import corpus, pretrain_gpt
from megatron_helix.experiment import launch, metrics
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.run_config import LayoutConfig, ModelConfig

# One vocabulary for every layout: Megatron pads it to a multiple of this times the tensor-parallel
# size, and 256 bytes need no padding up to 16 ranks.
_VOCAB_MULTIPLE = 16


def run(experiment: ExperimentConfig, out: Path, console: Console) -> list[dict[str, Any]]:
    """Run what is missing of ``experiment`` in ``out`` and return the results, baseline first.

    Returns:
        One result a run, as in ``results.json``.

    Raises:
        ValueError: when a layout cannot run; before any rank is started.
        RankFailed: when a rank of a run fails. Results of finished runs stay.
    """
    prefix = corpus_dataset(out, console)
    plan = [(model, layout) for model in experiment.models for layout in experiment.layouts]
    flags = {
        (model.name, layout.name): run_flags(experiment, model, layout, prefix, out)
        for model, layout in plan
    }
    ready = {
        run: pretrain_gpt.prepare(words, experiment.world_size) for run, words in flags.items()
    }
    progress = Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=console,
    )
    results = []
    with progress:
        for model in experiment.models:
            initial_weights(experiment, model, prefix, out)
            for layout in experiment.layouts:
                words = ready[model.name, layout.name]
                results.append(_run(experiment, model, layout, words, out, progress))
    return results


def corpus_dataset(out: Path, console: Console) -> Path:
    """Python's own standard library as a dataset: real text that every machine has."""
    prefix = out / "data" / "python_stdlib"
    if not prefix.with_suffix(".bin").exists():
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        summary = corpus.build(sources, prefix)
        console.print(f"corpus: {summary.documents:,} documents, {summary.tokens:,} tokens (bytes)")
    return prefix


def _common_flags(experiment: ExperimentConfig, model: ModelConfig, prefix: Path) -> list[str]:
    length = str(experiment.batch.sequence_length)
    return [
        *("--helix-device", experiment.device),
        *model.flags(),
        *corpus.TOKENIZER_FLAGS,
        *("--make-vocab-size-divisible-by", str(_VOCAB_MULTIPLE)),
        *("--data-path", str(prefix), "--split", "100,0,0"),
        "--no-create-attention-mask-in-dataloader",  # causal is what a GPT attends by itself
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--lr", str(experiment.learning_rate), "--lr-decay-style", "constant"),
        *("--eval-iters", "0", "--eval-interval", "1000000", "--log-interval", "1"),
    ]


def run_flags(
    experiment: ExperimentConfig, model: ModelConfig, layout: LayoutConfig, prefix: Path, out: Path
) -> list[str]:
    """The flags of one run: the model's weights come from the file that all its runs share."""
    return [
        *_common_flags(experiment, model, prefix),
        *layout.flags(model),
        *("--global-batch-size", str(experiment.batch.sequences)),
        *("--train-iters", str(experiment.steps)),
        *("--load", str(_initial(out, model)), "--finetune", "--no-load-optim", "--no-load-rng"),
        *("--helix-metrics", str(run_folder(out, model, layout) / "metrics")),
    ]


def _initial(out: Path, model: ModelConfig) -> Path:
    return out / "initial" / model.name


def run_folder(out: Path, model: ModelConfig, layout: LayoutConfig) -> Path:
    """Where one run keeps its result, metrics and logs."""
    return out / "runs" / f"{model.name}-{layout.name}"


def initial_weights(
    experiment: ExperimentConfig, model: ModelConfig, prefix: Path, out: Path
) -> None:
    """One step of one stock rank, saved: a checkpoint any layout can start from.

    Megatron draws weights differently for every pipeline size, so a common seed is not enough.
    """
    folder = _initial(out, model)
    if (folder / "latest_checkpointed_iteration.txt").exists():
        return
    flags = [
        *_common_flags(experiment, model, prefix),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1"),
        *("--save", str(folder), "--save-interval", "1", "--no-save-optim", "--no-save-rng"),
    ]
    flags = pretrain_gpt.prepare(flags, 1)
    launch.run(
        launch.Ranks(
            target=pretrain_gpt.train, args=(flags,), world_size=1, logs=folder.parent / "logs"
        )
    )


def _run(
    experiment: ExperimentConfig,
    model: ModelConfig,
    layout: LayoutConfig,
    flags: list[str],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The result of one run, measured now or kept from before."""
    folder = run_folder(out, model, layout)
    kept = folder / "result.json"
    identity = hashlib.sha256("\0".join(flags).encode()).hexdigest()[:16]
    task = progress.add_task(f"{model.name} {layout.name}", total=experiment.steps)
    if kept.exists() and json.loads(kept.read_text())["identity"] == identity:
        progress.update(task, completed=experiment.steps)
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    launch.run(
        launch.Ranks(
            target=pretrain_gpt.train,
            args=(flags,),
            world_size=experiment.world_size,
            logs=folder / "logs",
        ),
        poll=lambda: progress.update(task, completed=metrics.steps_done(folder / "metrics")),
    )
    progress.update(task, completed=experiment.steps)
    result = {
        "name": folder.name,
        "model": model.name,
        "layout": layout.name,
        "world_size": experiment.world_size,
        **asdict(metrics.read(folder / "metrics")),
        "device": experiment.device,
        "source": "measured",
        "identity": identity,
    }
    kept.write_text(json.dumps(result, indent=2))
    return result

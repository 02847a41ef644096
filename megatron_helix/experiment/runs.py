"""One run of an experiment: a model, a layout, a phase and a precision, as Megatron's flags.

Also what all runs of a model start from: the text, and one checkpoint of initial weights.
"""

import contextlib
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_helix import conversations, corpus
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import gradients, vocabulary
from megatron_helix.experiment.config import ExperimentConfig, Phase
from megatron_helix.inference import saved_model
from megatron_helix.launching import launchers
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import Precision


@contextlib.contextmanager
def named(run: "Run") -> Iterator[None]:
    """Name the run in the error of what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{run.model.name}, layout {run.layout.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run once."""

    model: ModelConfig
    layout: LayoutConfig
    phase: Phase
    precision: Precision
    is_check: bool = False

    @property
    def name(self) -> str:
        """Of the run and its folder."""
        words = [self.model.name, self.layout.name]
        words += [self.phase] if self.phase != "train" else []
        words += [self.precision] if self.is_check else []
        return "-".join(words)


def compared(experiment: ExperimentConfig) -> list[Run]:
    """The runs whose results are compared: by model and phase, the baseline first."""
    return [
        Run(model=model, layout=layout, phase=phase, precision=experiment.precision)
        for model in experiment.models
        for phase in experiment.phases
        for layout in experiment.layouts
    ]


def checks(experiment: ExperimentConfig) -> list[Run]:
    """The training runs beside them that the fp16 check needs: in fp16, and in fp32.

    Of layouts that Megatron trains in fp16.
    """
    if experiment.verification.fp16 is None:
        return []
    present = {
        (run.model.name, run.layout.name, run.precision)
        for run in compared(experiment)
        if run.phase == "train"
    }
    return [
        Run(model=model, layout=layout, phase="train", precision=precision, is_check=True)
        for model in experiment.models
        for layout in experiment.layouts
        for precision in ("fp32", "fp16")
        if layout.trains_in("fp16") and (model.name, layout.name, precision) not in present
    ]


def dataset(experiment: ExperimentConfig, out: Path, console: Console) -> Path:
    """The experiment's data, beside its results: a copy of its own, or the standard library's."""
    if experiment.data is None:
        if experiment.sft:
            return conversation_dataset(out, console, experiment.batch.sequence_length)
        return corpus_dataset(out, console)
    prefix = out / "data" / experiment.data.name
    prefix.parent.mkdir(parents=True, exist_ok=True)
    there, here = (dataset_files(experiment, at) for at in (experiment.data, prefix))
    for source, file in zip(there, here, strict=True):
        shutil.copyfile(source, file)
    return prefix


def dataset_files(experiment: ExperimentConfig, prefix: Path) -> list[Path]:
    """What the experiment's dataset consists of."""
    return (conversations if experiment.sft else corpus).dataset_files(prefix)


def conversation_dataset(out: Path, console: Console, row_tokens: int) -> Path:
    """The signatures of Python's own standard library, and what its docstrings say of them."""
    prefix = out / "data" / "python_docstrings"
    told = conversations.standard_library()
    summary = conversations.write(told, prefix, row_tokens=row_tokens)
    console.print(f"conversations: {summary}")
    return prefix


def corpus_dataset(out: Path, console: Console) -> Path:
    """Python's own standard library as a dataset: real text that every machine has."""
    prefix = out / "data" / "python_stdlib"
    if not prefix.with_suffix(".bin").exists():
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        summary = corpus.build(sources, prefix)
        console.print(f"corpus: {summary.documents:,} documents, {summary.tokens:,} tokens (bytes)")
    return prefix


def model_flags(experiment: ExperimentConfig, model: ModelConfig) -> list[str]:
    """What all runs of a model have in common, without the data."""
    length = str(experiment.batch.sequence_length)
    return [
        *("--helix-device", experiment.device),
        *model.flags(),
        *corpus.TOKENIZER_FLAGS,
        *vocabulary.flags(experiment),
        "--no-create-attention-mask-in-dataloader",  # causal is what a GPT attends by itself
        *(["--sft"] if experiment.sft else []),
        *("--seq-length", length),
        *([] if model.max_position_embeddings else ["--max-position-embeddings", length]),
        *("--lr", str(experiment.learning_rate), "--lr-decay-style", "constant"),
        *("--eval-iters", "0", "--log-interval", "1"),
        *(["--no-gradient-accumulation-fusion"] if experiment.device == "cuda" else []),
    ]


def steps(experiment: ExperimentConfig, run: Run) -> int:
    """How many steps a run takes; a decode run is one, for it says nothing before its end."""
    if run.phase == "decode":
        return 1
    fp16 = experiment.verification.fp16
    return (fp16.steps if run.is_check and fp16 else None) or experiment.steps


def _data_flags(experiment: ExperimentConfig, prefix: Path) -> list[str]:
    path = dataset_files(experiment, prefix)[0] if experiment.sft else prefix
    return ["--data-path", str(path), "--split", "100,0,0"]


def deployment(experiment: ExperimentConfig, run: Run) -> Deployment:
    """A run of Megatron's loop as the planner sees it.

    A prefill is here the forward pass of the training step, loss included: layouts compare by it.
    """
    return Deployment(
        run.model,
        run.layout,
        experiment.counted_batch,
        experiment.world_size,
        "train",
        run.precision,
        experiment.hardware,
        vocabulary.rows(experiment),
        gradients.flags(experiment),
    )


def settled(experiment: ExperimentConfig, run: Run) -> LayoutConfig:
    """The layout with what ``auto`` takes said: what runs is then what is predicted, anywhere."""
    if (run.layout.m or 1) == 1 or run.phase == "decode":
        return run.layout
    plan = deployment(experiment, run).plan
    split = None if plan.split == "none" else plan.split
    return run.layout.model_copy(update={"exchange": plan.exchange, "split": split})


def _sample_flags(experiment: ExperimentConfig, run: Run) -> list[str]:
    asked = experiment.samples
    if asked is None or run.phase != "train" or run.is_check:
        return []
    return [
        *("--helix-sample-interval", str(asked.interval)),
        *("--helix-sample-prompts", str(asked.prompts)),
        *("--helix-sample-tokens", str(asked.tokens)),
    ]


def layout_flags(experiment: ExperimentConfig, run: Run) -> list[str]:
    """Everything of a run but what lies in files.

    Raises:
        UserError: when the experiment's ``flags`` have one that its other keys set, and for a
            layout that Megatron does not train the model in.
    """
    run.layout.require_model(run.model, run.precision)
    fp16 = experiment.verification.fp16
    scale = fp16.loss_scale if fp16 else 65536.0
    precision = {
        "fp32": [],
        "bf16": ["--bf16"],
        "fp16": ["--fp16", "--initial-loss-scale", str(scale)],
    }
    own = [
        *model_flags(experiment, run.model),
        *settled(experiment, run).flags(run.model),
        *precision[run.precision],
        *("--global-batch-size", str(experiment.batch.sequences)),
        *("--train-iters", str(steps(experiment, run))),
        *_sample_flags(experiment, run),
    ]
    for flag in experiment.flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and name in own and name != vocabulary.FLAG:
            raise UserError(f"flags: {flag} is set by the experiment's other keys; leave it out")
    return [*own, *experiment.flags]


def run_flags(experiment: ExperimentConfig, run: Run, prefix: Path, out: Path) -> list[str]:
    """The flags of one run: the model's weights come from the file that all its runs share."""
    return [
        *layout_flags(experiment, run),
        *_data_flags(experiment, prefix),
        *start_flags(run.layout, initial_folder(out, run.model)),
        *("--helix-metrics", str(folder(out, run) / "metrics")),
        *("--helix-phase", run.phase),
    ]


def start_flags(layout: LayoutConfig, initial: Path) -> list[str]:
    """What lets a layout start from the weights that are saved in the folder ``initial``."""
    if layout.fsdp:  # once it is sharded, Megatron's own loading cannot fill every model
        return ["--helix-initial-weights", str(initial)]
    return ["--load", str(initial), "--finetune", "--no-load-optim", "--no-load-rng"]


def initial_folder(out: Path, model: ModelConfig) -> Path:
    """Where a model's initial weights are."""
    return out / "initial" / model.name


def folder(out: Path, run: Run) -> Path:
    """Where one run keeps its result, metrics and logs."""
    return out / "runs" / run.name


def initial_weights(
    experiment: ExperimentConfig,
    model: ModelConfig,
    prefix: Path,
    out: Path,
    poll: Callable[[], None] | None = None,
) -> Path:
    """One step of training, saved: a checkpoint any layout can start from.

    Megatron draws weights differently for every pipeline size, so a common seed is not enough. On
    the CPU one stock rank makes it; on GPUs the first layout, as the model may not fit on one. Of
    the experiment's ``flags`` it has those that make the model: decode runs read them there.

    Returns:
        The folder of the checkpoint; what is there already stays.
    """
    target = initial_folder(out, model)
    if (target / "latest_checkpointed_iteration.txt").exists():
        return target
    save = ["--save", str(target), "--save-interval", "1", "--no-save-optim", "--no-save-rng"]
    flags = [
        *model_flags(experiment, model),
        *_data_flags(experiment, prefix),
        *save,
        "--train-iters",
        "1",
    ]
    if experiment.flags:
        if experiment.device == "cpu":
            from megatron_helix.upstream import cpu_device  # slow: it imports torch

            cpu_device.enable()  # before Megatron is imported
        flags += saved_model.of_model_among(experiment.flags)
    ranks = 1
    if experiment.device == "cpu":
        flags += ["--micro-batch-size", "1", "--global-batch-size", "1"]
    else:
        ranks = experiment.world_size
        layout = experiment.layouts[0]
        flags += [*layout.flags(model), "--global-batch-size", str(experiment.batch.sequences)]
    launchers.launch(experiment.launcher, flags, ranks, target.parent / "logs" / model.name, poll)
    return target


def source_of(run: Run) -> dict[str, Any]:
    """A run as JSON."""
    return {
        "model": run.model.model_dump(mode="json"),
        "layout": run.layout.model_dump(),
        "phase": run.phase,
        "precision": run.precision,
    }

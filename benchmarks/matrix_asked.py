"""What ``gpu_matrix.py`` is to run: a shape and the layouts that fit, or an experiment file's.

On a CPU a file is rehearsed: its models are cut small, and layouts that need GPUs are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_turns import Device, layouts, rivals

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.core_attention import NAMES
from megatron_helix.run_config.layout import LayoutConfig
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
SIZES = (1, 2, 4, 8, 16)  # micro-batches that the layouts of a shape try
BATCH = BatchConfig(sequences=16, sequence_length=2048)
REHEARSED_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is run where no option says otherwise; the layouts of a shape depend on options.

    Attributes:
        models: each has tables of its own.
        layouts: an experiment file's; None for those of ``matrix_turns.py``.
        gpus: an experiment file's ``world_size``.
        batch: tokens of a step.
        precision: of all but parity.
        flags: more of Megatron's, that the model's formulas have to know of.
        hardware: to predict for.
        peak_tflops: of one GPU, for MFU.
    """

    models: Sequence[ModelConfig]
    layouts: Sequence[LayoutConfig] | None = None
    gpus: int | None = None
    batch: BatchConfig = BATCH
    precision: Precision = "fp16"
    flags: tuple[str, ...] = ()
    hardware: Hardware | None = None
    peak_tflops: float | None = None

    def arms(
        self, gpus: int, model: ModelConfig, sizes: Sequence[int], device: Device, part: str
    ) -> list[LayoutConfig]:
        """The layouts of a part; each at every micro-batch of ``sizes``, a file's also as it is."""
        if self.layouts is not None:
            return [*self.layouts] if not sizes else _at_sizes(self.layouts, sizes)
        sizes = [size for size in sizes or SIZES if size <= self.batch.sequences]
        if part == "decode":  # what is served has no data parallelism to shard anything
            return layouts(gpus, model, sizes[:1])
        return layouts(gpus, model, sizes) + rivals(gpus, model, sizes, device)


def of_shape(name: str) -> Asked:
    """A shape of :data:`SHAPES`."""
    if name not in SHAPES:
        raise UserError(f"--shape: must be one of {', '.join(SHAPES)}, got {name!r}; correct it")
    return Asked(models=SHAPES[name])


def of_file(path: Path, device: Device) -> Asked:
    """An experiment file: models, layouts, batch, precision, flags, hardware and peak."""
    given = config.load(path)
    shared = {"gpus": given.world_size, "precision": given.precision}
    if device == "cuda":
        return Asked(
            models=given.models,
            layouts=given.layouts,
            batch=given.batch,
            flags=given.flags,
            hardware=given.hardware,
            peak_tflops=given.peak_tflops,
            **shared,
        )
    return Asked(
        models=[_small(model) for model in given.models],
        layouts=[one for one in given.layouts if _runs_on_cpu(one)],
        # Without the file's flags rows are not packed.
        batch=BatchConfig(sequences=given.batch.sequences, sequence_length=REHEARSED_LENGTH),
        **shared,
    )


def named(arms: Sequence[LayoutConfig], words: Sequence[str]) -> list[LayoutConfig]:
    """The layouts that have a word's name, or where none has it those with the word in theirs."""
    names = {arm.name for arm in arms}
    found = [
        arm
        for arm in arms
        if not words or any(w == arm.name or (w not in names and w in arm.name) for w in words)
    ]
    if not found:
        raise UserError(
            f"--only: must be of {', '.join(sorted(names))}, got {','.join(words)}; correct it"
        )
    return found


def with_cores(arms: Sequence[LayoutConfig], cores: Sequence[str]) -> list[LayoutConfig]:
    """Each layout with each core attention in turn; as it is without any."""
    for core in cores:
        if core not in NAMES:
            raise UserError(f"--cores: must be some of {','.join(NAMES)}, got {core!r}; correct it")
    if not cores:
        return [*arms]
    return [
        arm.model_copy(update={"name": f"{arm.name}_{core}", "core_attention": core})
        for arm in arms
        for core in cores
    ]


def _at_sizes(arms: Sequence[LayoutConfig], sizes: Sequence[int]) -> list[LayoutConfig]:
    return [
        arm.model_copy(update={"name": f"{arm.name}_mb{size}", "micro_batch": size})
        for arm in arms
        for size in sizes
    ]


def _runs_on_cpu(layout: LayoutConfig) -> bool:
    return layout.gtp == layout.cp == 1


def _small(model: ModelConfig) -> ModelConfig:
    """A model of the same kind that a CPU trains in seconds; text is bytes."""
    grouped = model.num_query_groups is not None
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16}
    heads = {"num_attention_heads": 4, "num_query_groups": 2 if grouped else None}
    return model.model_copy(update={**sizes, **heads, "vocab_size": 256})

"""Models and a batch in other sizes than a file's; ``gpu_matrix.py`` has them as well."""

from collections.abc import Sequence
from typing import Any

from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.model import ModelConfig


def reshaped(
    models: Sequence[ModelConfig],
    batch: BatchConfig,
    *,
    layers: int | None,
    sequences: int | None,
    sequence_length: int | None,
) -> dict[str, Any]:
    """``models`` and ``batch``, by name, with what options say; None leaves a size as it is."""
    sizes = {"sequences": sequences, "sequence_length": sequence_length}
    return {
        "models": [
            model.model_copy(update={"num_layers": layers or model.num_layers}) for model in models
        ],
        "batch": batch.model_copy(update={key: size for key, size in sizes.items() if size}),
    }

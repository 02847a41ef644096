"""An experiment file: which models, which layouts side by side, on what data, for how many steps.

An error names the file and the path of the key.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from megatron_helix.run_config import BatchConfig, Config, LayoutConfig, ModelConfig, read_mapping


class Tolerance(Config):
    """How far a layout may leave the baseline, relative, at any step."""

    loss: float = Field(default=1e-5, gt=0)
    grad_norm: float = Field(default=1e-4, gt=0)


class ExperimentConfig(Config):
    """Layouts of one or more models side by side; the first layout is the baseline."""

    name: str
    models: list[ModelConfig] = Field(min_length=1)
    layouts: list[LayoutConfig] = Field(min_length=1)
    world_size: PositiveInt
    batch: BatchConfig
    steps: PositiveInt
    learning_rate: float = Field(default=1e-3, gt=0)
    device: Literal["cpu", "cuda"]
    tolerance: Tolerance = Tolerance()

    @model_validator(mode="after")
    def _names_differ(self) -> "ExperimentConfig":
        for what, items in (("models", self.models), ("layouts", self.layouts)):
            names = [item.name for item in items]
            if len(set(names)) != len(names):
                raise ValueError(f"{what}: names must differ, got {', '.join(names)}")
        return self


def load(path: Path) -> ExperimentConfig:
    """Read an experiment file. A model may be given by the path of its file, relative to it.

    Raises:
        ValueError: naming the file, the path of each bad key, and what was wrong with it.
    """
    document = read_mapping(path)
    if isinstance(document.get("models"), list):
        document["models"] = [
            read_mapping(path.parent / model) if isinstance(model, str) else model
            for model in document["models"]
        ]
    try:
        return ExperimentConfig.model_validate(document)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, item['loc'])) or 'experiment'}: {item['msg']},"
            f" got {item['input']!r}"
            for item in error.errors()
        ]
        raise ValueError("\n".join(lines)) from None

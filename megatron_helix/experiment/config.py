"""An experiment file: which models, which layouts side by side, on what data, for how many steps.

An error names the file and the path of the key.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_helix import conversations, corpus
from megatron_helix.basics.errors import UserError
from megatron_helix.launching.launcher_config import LauncherConfig
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import Config, read_mapping, validated
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import ELEMENT_BYTES, Precision

Phase = Literal["train", "prefill", "decode"]

FP16_ROUNDOFF = 2.0**-11  # half the distance of 1 to the next number of fp16

_NAME = re.compile(r"\w[\w.-]*")


class Tolerance(Config):
    """How far a layout may leave the baseline, relative, at any step.

    Attributes:
        loss: of the loss.
        grad_norm: of the gradient norm.
    """

    loss: float = Field(default=1e-5, gt=0)
    grad_norm: float = Field(default=1e-4, gt=0)


class Fp16Config(Config):
    """Every layout trains once in fp32 and once in fp16, from the same weights on the same data.

    Attributes:
        loss_scale: the loss scale of the first step.
        band: how far the fp16 loss may be from the fp32 loss, relative, at any step. Four unit
            roundoffs of fp16 by default: the loss is a mean over tokens of sums in fp32, so that
            the roundings of single products, of one roundoff each, mostly cancel.
        steps: of the runs that are made for this check only; null for all of the experiment's.
    """

    loss_scale: PositiveFloat = 65536.0
    band: PositiveFloat = 4 * FP16_ROUNDOFF
    steps: PositiveInt | None = None


class DecodeConfig(Config):
    """The request that the decode phase serves; the prompts are of the text that is trained on.

    Attributes:
        sequences: served together; data-parallel ranks share them.
        prompt_length: tokens of each prompt.
        output_length: new tokens of each. The prefill makes the first, and percentiles of the time
            between two tokens need two of them.
    """

    sequences: PositiveInt
    prompt_length: PositiveInt
    output_length: int = Field(ge=3)


class SamplesConfig(Config):
    r"""Text while training, of the runs that are compared.

    Attributes:
        interval: steps from one to the next.
        prompts: a file of them, one a line, ``\n`` for a line break.
        tokens: new ones for each prompt.
    """

    interval: PositiveInt
    prompts: Path
    tokens: PositiveInt = 32


class VerificationConfig(Config):
    """What the deployment verification asks for.

    Attributes:
        fp16: the check of numerical stability; null leaves it out.
        time_factor: by which the ledger's and the profiler's time of the collectives may differ.
        balance: largest max/mean over ranks of parameters, KV bytes and FLOPs of a helix layout.
        routing_balance: the same of the FLOPs of an MoE model, which its router hands out.
        busy_balance: the same of the measured busy time.
    """

    fp16: Fp16Config | None = Fp16Config()
    time_factor: float = Field(default=2.0, gt=1)
    balance: float = Field(default=1.05, ge=1)
    routing_balance: float = Field(default=2.0, ge=1)
    busy_balance: float = Field(default=1.5, ge=1)


class Claim(Config):
    """Figures somebody else has published for one phase of one layout of one model.

    Attributes:
        model: its name in this experiment.
        layout: its name in this experiment.
        phase: that the figures are of.
        tokens_per_s: TPS.
        tpot_ms: TPOT.
        of: who claims them.
    """

    model: str
    layout: str
    phase: Phase
    tokens_per_s: PositiveFloat
    tpot_ms: PositiveFloat
    of: str


class ExperimentConfig(Config):
    """Layouts of one or more models side by side; the first layout is the baseline.

    Attributes:
        name: of the experiment, for the report.
        models: what is trained.
        layouts: how the ranks share a model; the first one is the baseline.
        world_size: ranks, of every layout.
        batch: tokens of one step.
        data: prefix of a dataset that ``helix data`` made; null is Python's standard library.
        sft: whether that is a dataset of conversations, packed into rows; null data are the
            signatures and docstrings of Python's standard library.
        phases: what every layout does: train; prefill, which is the forward pass of a training
            step alone; decode, which serves a request.
        decode: what the phase ``decode`` serves.
        samples: what the models are asked while they train; null asks nothing.
        steps: of a run; the first one warms up and counts in no time.
        learning_rate: constant.
        device: of the ranks.
        launcher: what starts them.
        precision: of the runs that are compared.
        flags: more of Megatron's, for the runs that train or prefill; those that make the model
            hold for decode runs too.
        hardware: what to predict the runs for, beside measuring them; null predicts nothing.
        peak_tflops: of one device at that precision, for MFU; the device's datasheet says it.
        tolerance: how far layouts may be from the first one.
        verification: what the deployment verification asks for.
        claims: figures of others, to stand beside what is measured.
        outlook: what to predict beside, of layouts that run here, for what cannot run here.
    """

    name: str
    models: list[ModelConfig] = Field(min_length=1)
    layouts: list[LayoutConfig] = Field(min_length=1)
    world_size: PositiveInt
    batch: BatchConfig
    data: Path | None = None
    sft: bool = False
    phases: list[Phase] = Field(default=["train"], min_length=1)
    decode: DecodeConfig | None = None
    samples: SamplesConfig | None = None
    steps: PositiveInt
    learning_rate: float = Field(default=1e-3, gt=0)
    device: Literal["cpu", "cuda"]
    launcher: LauncherConfig = LauncherConfig()
    precision: Precision = "fp32"
    flags: tuple[str, ...] = ()
    hardware: Hardware | None = None
    peak_tflops: PositiveFloat | None = None
    tolerance: Tolerance = Tolerance()
    verification: VerificationConfig = VerificationConfig()
    claims: tuple[Claim, ...] = ()
    outlook: "OutlookConfig | None" = None

    @cached_property
    def counted_batch(self) -> BatchConfig:
        """The batch as the planner counts it: of conversations, packed, their lengths are known."""
        if not self.sft or self.batch.documents:
            return self.batch
        told = conversations.read(self.data) if self.data else conversations.standard_library()
        return self.batch.model_copy(update={"documents": conversations.lengths(told)})

    @model_validator(mode="after")
    def _fits_together(self) -> "ExperimentConfig":
        for what, items in (("models", self.models), ("layouts", self.layouts)):
            names = [item.name for item in items]
            if len(set(names)) != len(names):
                raise UserError(f"{what}: names must differ, got {', '.join(names)}")
            for name in names:
                if not _NAME.fullmatch(name):
                    raise UserError(
                        f"{what}: a name must be letters, digits, '_', '.' and '-', for it names"
                        f" folders, got {name!r}; rename it"
                    )
        if len(set(self.phases)) != len(self.phases):
            raise UserError(f"phases: must differ, got {', '.join(self.phases)}")
        if self.layouts[0].fsdp == "megatron_fsdp":
            raise UserError(
                "layouts: the first one makes the weights that all start from, in torch_dist, and"
                f" {self.layouts[0].name} saves in Megatron FSDP's own format; begin with another"
            )
        self._require_decode()
        self._require_samples()
        if self.sft and self.phases != ["train"]:
            raise UserError(
                f"sft: is a way to train, got phases {', '.join(self.phases)}; leave phases away"
            )
        self._require_hardware()
        self._require_outlook()
        if self.device == "cuda" and self.launcher.kind == "fork":
            raise UserError(
                "launcher.kind: must be torchrun or slurm on cuda, got fork; a process that has"
                " touched a GPU must not fork"
            )
        if self.world_size % self.launcher.nodes:
            raise UserError(
                f"launcher.nodes: must divide world_size ({self.world_size}), got"
                f" {self.launcher.nodes}"
            )
        if self.launcher.nodes > 1 and self.launcher.kind != "slurm":
            raise UserError(
                f"launcher.nodes: must be 1 with {self.launcher.kind}, got {self.launcher.nodes};"
                " use kind: slurm for several machines"
            )
        for claim in self.claims:
            for what, name, items in (
                ("model", claim.model, self.models),
                ("layout", claim.layout, self.layouts),
            ):
                if name not in [item.name for item in items]:
                    raise UserError(f"claims: {what} {name} is not in this experiment")
            if claim.phase not in self.phases:
                raise UserError(
                    f"claims: phase {claim.phase} is not in this experiment; add it, or take the"
                    " claim out"
                )
        return self

    def _require_decode(self) -> None:
        if self.decode is None:
            if "decode" in self.phases:
                raise UserError(
                    "decode: must be given with the phase decode, got none; say sequences,"
                    " prompt_length and output_length"
                )
            return
        if "decode" not in self.phases:
            raise UserError(
                "decode: needs the phase decode, which phases do not name; add it, or leave decode"
                " out"
            )
        length = self.decode.prompt_length + self.decode.output_length
        if length > self.batch.sequence_length:
            raise UserError(
                "decode: prompt_length + output_length must fit the model's positions,"
                f" batch.sequence_length ({self.batch.sequence_length}), got {length};"
                " shorten one of the two"
            )

    def _require_samples(self) -> None:
        if self.samples is None:
            return
        if "train" not in self.phases:
            raise UserError(
                f"samples: need the phase train, got {', '.join(self.phases)}; add it, or leave"
                " samples out"
            )
        for layout in self.layouts:
            if layout.fsdp or layout.cp > 1:
                raise UserError(
                    f"samples: layouts must be able to generate while they train, and {layout.name}"
                    " cannot, with fsdp or cp; leave the layout or samples out"
                )

    def _require_outlook(self) -> None:
        if self.outlook is None:
            return
        other = self.outlook.experiment
        there = {layout.name: layout for layout in other.layouts}
        shared = [layout for layout in self.layouts if layout.name in there]
        if not shared:
            raise UserError(
                "outlook.experiment: must have a layout of the same name, and has"
                f" {', '.join(there)}; rename one"
            )
        for layout in shared:
            # What goes by the size of model and batch may be another one.
            free = ("micro_batch", "gather", "gather_layers", "core_attention")
            changed = {key: getattr(layout, key) for key in free}
            if there[layout.name].model_copy(update=changed) != layout:
                raise UserError(
                    f"outlook.experiment: {layout.name} must be the same layout there, but for"
                    f" {', '.join(free)}, and {other.name} has another one; rename it"
                )

    def _require_hardware(self) -> None:
        machine = self.hardware
        if machine is None:
            return
        size = ELEMENT_BYTES[self.precision]
        if machine.element_bytes != size:
            raise UserError(
                f"hardware: {machine.name} has figures for elements of {machine.element_bytes}"
                f" bytes, and {self.precision} has {size}; leave it out, or name another file"
            )
        if machine.inter_node is None and self.world_size > machine.devices_per_node:
            raise UserError(
                f"hardware: {machine.name} has {machine.devices_per_node} devices in its one node,"
                f" and the experiment {self.world_size} ranks; name a file with inter_node, or make"
                f" one with helix calibrate --device {self.device} --ranks {self.world_size}"
            )


class OutlookConfig(Config):
    """Another experiment, whose models and batch this one's layouts are predicted for.

    Attributes:
        experiment: with the layouts of the same names, and claims to stand beside.
        hardware: machines to predict for, one after the other.
    """

    experiment: ExperimentConfig
    hardware: list[Hardware] = Field(min_length=1)


def load(path: Path, hardware: Path | None = None) -> ExperimentConfig:
    """Read an experiment file.

    Models, hardware and outlook may be given by the paths of their files, relative to it, as the
    data and the prompts of samples are.

    Args:
        path: of the file.
        hardware: a hardware file, instead of the one that the experiment names.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    document = read_mapping(path)
    if isinstance(document.get("models"), list):
        document["models"] = _read_all(path, document["models"])
    if hardware:
        document["hardware"] = read_mapping(hardware)
    elif isinstance(document.get("hardware"), str):
        document["hardware"] = read_mapping(path.parent / document["hardware"])
    if isinstance(outlook := document.get("outlook"), dict):
        if isinstance(outlook.get("experiment"), str):
            outlook["experiment"] = load(path.parent / outlook["experiment"])
        if isinstance(machines := outlook.get("hardware"), list):
            outlook["hardware"] = _read_all(path, machines)
    if isinstance(document.get("data"), str):
        document["data"] = path.parent / document["data"]
        kind = conversations if document.get("sft") else corpus
        kind.require_dataset(document["data"], f"{path}: data")
    if isinstance(asked := document.get("samples"), dict) and isinstance(asked.get("prompts"), str):
        asked["prompts"] = path.parent / asked["prompts"]
        if not asked["prompts"].is_file():
            raise UserError(
                f"{path}: samples.prompts: must be a text file, got {asked['prompts']}, which does"
                " not exist; write one prompt a line there"
            )
    return validated(ExperimentConfig, document, path)


def _read_all(path: Path, items: list[Any]) -> list[Any]:
    """The items, and what is in their files where they are paths relative to ``path``."""
    return [read_mapping(path.parent / one) if isinstance(one, str) else one for one in items]

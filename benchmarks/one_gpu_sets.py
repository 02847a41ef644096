"""The sets of ``one_gpu_parity.py``: which trainings, from which weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix_turns import LAUNCHER, LOCAL, Device
from one_gpu_turns import Training
from rich.console import Console

from megatron_helix import conversations
from megatron_helix.basics.errors import UserError
from megatron_helix.corpus import END
from megatron_helix.experiment import runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.options.features.captured import CAPTURED
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

Cut = dict[str, Any]

PACKED = 1024  # tokens of a packed row
LENGTH = 128  # of rows on the CPU, at most

STOCK: Cut = {"tp": 2}
HELIX: dict[str, Cut] = {
    exchange: {"m": 2, "n": 1, "exchange": exchange} for exchange in ("activations", "weights")
}
KEPT: dict[str, Cut] = {"step": {**HELIX["weights"], "gather": "step"}}  # for a step
PARTLY: dict[str, Cut] = {  # or some of it
    "once": {**HELIX["weights"], "gather": "once"},
    "layer": {**KEPT["step"], "gather_layers": 1},
}
MODEL = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "swiglu": True}
MODEL |= {"normalization": "RMSNorm", "untie_embeddings_and_output_weights": True}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16, "qk_layernorm": True},
    "cuda": {"hidden_size": 512, "ffn_hidden_size": 1024, "kv_channels": 128, "qk_layernorm": True},
}
RECIPES = {
    "tensorwise": (),
    "delayed": ("--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max"),
    "blockwise": (),
}
GRAPHS = {
    exchange: ("none", *(name for name, those in CAPTURED.items() if exchange in those))
    for exchange in HELIX
}
KINDS = {  # of packed rows
    "documents": ("--dataloader-inter-document-masking", "--eod-mask-loss"),
    "sft": ("--sft",),
}
SAVE = ("--save-interval", "1", "--no-save-optim", "--no-save-rng", "--ckpt-format", "torch_dist")


@dataclass(frozen=True)
class Bench:
    """What is asked for.

    Attributes:
        out: folder of everything.
        device: of the ranks.
        steps: of a run; None for a set's own number.
        console: takes what is said of the data.
    """

    out: Path
    device: Device
    steps: int | None
    console: Console

    def length(self, asked: int) -> int:
        """Tokens of a row of which a GPU would have ``asked``."""
        return min(asked, LENGTH) if self.device == "cpu" else asked


class Set:
    """Trainings of one model on one dataset.

    Args:
        bench: what is asked for.
        data: what they read.
        length: tokens of a row.
        steps: of a run.
        micro_batch: rows of a micro-batch.
        sequences: rows of a step.
        learning_rate: constant.
    """

    def __init__(
        self,
        bench: Bench,
        data: Path,
        *,
        length: int,
        steps: int,
        micro_batch: int = 4,
        sequences: int = 4,
        learning_rate: float = 1e-3,
    ):
        self.bench, self.data, self.micro_batch = bench, data, micro_batch
        self.weights = bench.out / "weights"
        self.experiment = ExperimentConfig(
            name="one_gpu_parity",
            models=[ModelConfig(name="dense", **MODEL, **SIZES[bench.device])],
            layouts=[self._layout("stock", STOCK)],
            world_size=2,
            batch=BatchConfig(sequences=sequences, sequence_length=bench.length(length)),
            steps=bench.steps or steps,
            learning_rate=learning_rate,
            device=bench.device,
            launcher=LAUNCHER,
        )

    def _layout(self, name: str, cut: Cut) -> LayoutConfig:
        return LayoutConfig(name=name, micro_batch=self.micro_batch, **cut)

    def recorded(self, name: str, cut: Cut, *more: str, fp32: bool = False) -> Training:
        """A run as an experiment has it: recorded, with its last step profiled."""
        folder = str(self.bench.out / name / "metrics")
        record = ("--helix-metrics", folder, "--helix-profile")
        return self.training(name, cut, *more, *record, fp32=fp32)

    def training(
        self, name: str, cut: Cut, *more: str, fp32: bool = False, saves: bool = False
    ) -> Training:
        """A run of a layout, with more of Megatron's flags.

        Args:
            name: of the run.
            cut: what the layout has beside its micro-batch.
            more: flags.
            fp32: whether in single precision, in torch's layers.
            saves: whether it makes the weights that others start from, in one step.
        """
        experiment, layout = self.experiment, self._layout(name, cut)
        (model,), steps = experiment.models, 1 if saves else experiment.steps
        engine = LOCAL if fp32 and experiment.device == "cuda" else ()
        start = ("--save", str(self.weights), *SAVE)
        flags = (
            *runs.model_flags(experiment, model),
            *layout.flags(model),
            *(engine if fp32 else ("--bf16",)),
            *("--global-batch-size", str(experiment.batch.sequences)),
            *("--train-iters", str(steps), "--distributed-timeout-minutes", "2"),
            *("--data-path", str(self.data), "--split", "100,0,0", "--num-workers", "0"),
            *("--data-cache-path", str(self.bench.out / name / "cache")),  # written by one run
            *(start if saves else runs.start_flags(layout, self.weights)),
            *more,
        )
        return Training(
            name=name,
            folder=self.bench.out / name,
            flags=flags,
            ranks=layout.tensor_parallel_size,
            steps=steps,
            is_first=saves,
        )

    def first(self) -> Training:
        """The run of stock whose checkpoint the others start from."""
        return self.training("initial", STOCK, saves=True)


def fp8(bench: Bench) -> Iterator[Training]:
    """Stock and helix in bf16 and by each recipe."""
    of_set = Set(bench, _text(bench), length=256, steps=50, learning_rate=5e-4)
    yield of_set.first()
    for recipe in ("bf16", *RECIPES):
        flags: tuple[str, ...] = ()
        if recipe != "bf16":
            flags = ("--fp8-format", "hybrid", "--fp8-recipe", recipe, *RECIPES[recipe])
        for name, cut in {"tp2": STOCK, **HELIX, **KEPT}.items():
            yield of_set.training(f"{recipe}-{name}", cut, *flags)


def packed(bench: Bench) -> Iterator[Training]:
    """Rows of documents, and of conversations."""
    for kind, flags in KINDS.items():
        data = _documents(bench) if kind == "documents" else _conversations(bench)
        of_set = Set(bench, data, length=PACKED, steps=5, micro_batch=2)
        if kind == "documents":
            yield of_set.first()
        yield from _beside_stock(of_set, kind, *flags)


def batch(bench: Bench) -> Iterator[Training]:
    """Rows of one document under the batch split, by every way to gather weights."""
    of_set = Set(bench, _text(bench), length=256, steps=5, micro_batch=2, sequences=8)
    yield of_set.first()
    yield from _beside_stock(of_set, "rows", more=PARTLY, split="batch")


def sequence(bench: Bench) -> Iterator[Training]:
    """Rows of one document under the sequence split."""
    of_set = Set(bench, _text(bench), length=1024, steps=5, micro_batch=1)
    yield of_set.first()
    yield from _beside_stock(of_set, "rows", split="sequence")


def _beside_stock(
    of_set: Set,
    kind: str,
    *flags: str,
    more: Mapping[str, Cut] | None = None,
    split: str | None = None,
) -> Iterator[Training]:
    """Stock on two ranks and helix; stock on one, and once more in single precision."""
    yield of_set.recorded(f"{kind}-tp2", STOCK, *flags)
    for name, cut in {**HELIX, **KEPT, **(more or {})}.items():
        yield of_set.recorded(f"{kind}-{name}", {**cut, "split": split}, *flags)
    yield of_set.recorded(f"{kind}-tp1", {"tp": 1}, *flags)
    yield of_set.recorded(f"{kind}-fp32", {"tp": 1}, *flags, fp32=True)


def graphs(bench: Bench) -> Iterator[Training]:
    """Helix with CUDA graphs and without."""
    of_set = Set(bench, _text(bench), length=256, steps=8, sequences=8)
    yield of_set.first()
    flags = ("--te-rng-tracker", "--no-check-for-nan-in-loss-and-grad", "--cuda-graph-impl")
    for exchange, captured in GRAPHS.items():
        cut = {**HELIX[exchange], "split": "batch"}
        for graph in captured:
            yield of_set.training(f"{exchange}-{graph}", cut, *flags, graph)


SETS: dict[str, Callable[[Bench], Iterator[Training]]] = {
    "fp8": fp8,
    "packed": packed,
    "batch": batch,
    "sequence": sequence,
    "graphs": graphs,
}
ON_GPUS = ("fp8", "graphs")
DETERMINISTIC = ("graphs",)  # sets that compare bits


def trainings(name: str, bench: Bench) -> list[Training]:
    """Those of a set, in order.

    Raises:
        UserError: for a set that does not exist, or does not run on the device.
    """
    if name not in SETS:
        raise UserError(f"SET: must be one of {', '.join(SETS)}, got {name}; use one of them")
    if bench.device == "cpu" and name in ON_GPUS:
        raise UserError(f"--device: {name} must have a GPU, got cpu; leave --device away")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda must have a GPU, and torch sees none; rehearse with cpu")
    if bench.device == "cuda" and find_spec("transformer_engine") is None:
        raise UserError("--device: cuda must have TransformerEngine, and found none; install it")
    return [*SETS[name](bench)]


def _text(bench: Bench) -> Path:
    return runs.corpus_dataset(bench.out, bench.console)


def _conversations(bench: Bench) -> Path:
    prefix = runs.conversation_dataset(bench.out, bench.console, bench.length(PACKED))
    (file,) = conversations.dataset_files(prefix)
    return file


def _documents(bench: Bench) -> Path:
    """What Python's standard library says of its functions, a document each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = bench.out / "data" / "documents"
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8)
    for talk in conversations.standard_library():
        text = "\n".join(message["content"] for message in talk).encode()
        builder.add_document(torch.tensor([*text, END]), [len(text) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix

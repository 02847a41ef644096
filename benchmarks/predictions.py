"""Every step that was measured on GPUs beside what the planner predicts of it.

    python benchmarks/predictions.py

It reads ``benchmarks/results``; nothing runs. A prediction holds if it is within the planner's
error (:mod:`megatron_helix.planner.accuracy`), within which ``helix plan`` calls layouts a tie. A
test asks that of every row of two GPUs but for the figures that the results call outside, with the
reason. Constants of the hardware files are from these very steps, where they say so; rows of four
GPUs show what they are worth elsewhere.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_helix.machine import hardware
from megatron_helix.planner import accuracy, search
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOURCE_SHAPE: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 8192, "num_attention_heads": 16, "kv_channels": 512},
    "ffn_hidden_size": 32768,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured step.

    Attributes:
        cell: what was compared.
        name: of the layout.
        machine: hardware file.
        here: what ran.
        measured: ``tokens_per_s``, ``memory_gb``, ``tpot_ms``, what there is of them.
        outside: of these, what is not predicted within its bar, and why.
    """

    cell: str
    name: str
    machine: hardware.Hardware
    here: Deployment
    measured: dict[str, float]
    outside: dict[str, str] = field(default_factory=dict)

    @property
    def predicted(self) -> dict[str, float]:
        """The same figures by the planner."""
        figures = accuracy.figures(predict(self.here, self.machine))
        return {key: figures[key] for key in self.measured}

    def errors(self) -> dict[str, float]:
        """Of the predictions, relative."""
        return {key: self.predicted[key] / self.measured[key] - 1 for key in self.measured}

    def missed(self) -> set[str]:
        """Figures beyond their bars."""
        beyond = {key for key, error in self.errors().items() if abs(error) > accuracy.ERROR[key]}
        if "tpot_ms" in beyond:
            apart = abs(self.predicted["tpot_ms"] - self.measured["tpot_ms"])
            beyond -= {"tpot_ms"} if apart <= accuracy.NEGLIGIBLE_TPOT_MS * (1 + 1e-9) else set()
        return beyond


def two_gpus() -> Iterator[Row]:
    """The rows that the bars are for."""
    yield from _cells("two_h200_rivals", "two_h200_matrix", "two_gpus")


def _cells(*files: str) -> Iterator[Row]:
    """Every row of results that say its model, layout and batch."""
    for file in files:
        results = json.loads((RESULTS / f"{file}.json").read_text())
        for cell in results["cells"]:
            common = {**results, **cell}
            machine = _machine(common["hardware"])
            for row in cell["rows"]:
                keys = row["layout"]
                name = search.name({**keys, "gather": keys.get("gather")})
                if core := keys.get("core_attention"):
                    name += f", {core}"
                here = _deployment(
                    ModelConfig(**cell["model"]),
                    LayoutConfig(name=name, **keys),
                    BatchConfig(**cell["batch"]),
                    machine,
                    phase=common["phase"],
                    precision=common["precision"],
                    gradient_flags=GradientFlags(**row.get("gradient_flags", {})),
                )
                figures = _figures(row, here)
                outside = row.get("outside", {})
                yield Row(
                    cell=f"{cell['name']}, {common['hardware']}",
                    name=name,
                    machine=machine,
                    here=here,
                    measured=figures,
                    outside=outside,
                )


def four_gpus() -> Iterator[Row]:
    """Beside rivals, and what ``gpu_matrix.py`` wrote before, with experts evenly loaded."""
    yield from _cells("four_h200_rivals")
    results = json.loads((RESULTS / "four_h200.json").read_text())
    machine, batch = _machine("h200_4"), BatchConfig(sequences=32, sequence_length=2048)
    for cell in ("prefill-dense", "train-dense", "prefill-moe", "train-moe"):
        experts: dict[str, Any] = {"num_experts": 8} if cell.endswith("moe") else {}
        model = ModelConfig(name=cell, **SOURCE_SHAPE, **experts)
        for row in results[cell]:
            if "copies" in row["layout"]:  # of a trial that was taken out again
                continue
            # Its names say data parallelism and leave out that weights move.
            said = re.sub("_dp[24]", "", row["layout"])
            said = re.sub("^(helix_.x.)_step", r"\1_weights_step", said)
            keys: dict[str, Any] = dict(search.named(said))
            keys["distributed_optimizer"] = said != row["layout"]
            keys["ep"] = (2 if "pp" in keys else 4) if experts else 1
            layout = LayoutConfig(name=row["layout"], **keys)
            phase = "train" if cell.startswith("train") else "forward"
            here = _deployment(model, layout, batch, machine, phase=phase, precision="fp16")
            yield Row(
                cell=f"{cell}, h200_4",
                name=row["layout"],
                machine=machine,
                here=here,
                measured=_figures(row, here),
            )


def _machine(name: str) -> hardware.Hardware:
    return hardware.load(ROOT / "configs" / "hardware" / f"{name}.yaml")


def _deployment(
    model: ModelConfig,
    layout: LayoutConfig,
    batch: BatchConfig,
    machine: hardware.Hardware,
    *,
    phase: str,
    precision: Any,
    gradient_flags: GradientFlags = GradientFlags(),
) -> Deployment:
    known = model, layout, batch, machine.devices, phase, precision, machine
    return Deployment(*known, gradient_flags=gradient_flags).check()


def _figures(row: dict[str, Any], here: Deployment) -> dict[str, float]:
    found: dict[str, float | None] = {
        "tokens_per_s": here.step_tokens / row["step_ms"] * 1e3 if "step_ms" in row else None,
        "memory_gb": row.get("memory_gb"),
        "tpot_ms": row.get("tpot_ms"),
    }
    if "memory_mib" in row:
        found["memory_gb"] = row["memory_mib"] * 2**20 / 1e9
    return {key: figure for key, figure in found.items() if figure is not None}


def table(title: str, rows: list[Row]) -> Table:
    """Measured, predicted and the error of every figure; a star where it is beyond its bar."""
    made = Table(title=title)
    made.add_column("cell, machine")
    made.add_column("layout")
    for heading in ("TPS", "memory GB", "TPOT ms"):
        made.add_column(f"{heading}: measured, predicted, error", justify="right", no_wrap=True)
    formats = {"tokens_per_s": ",.0f", "memory_gb": ".1f", "tpot_ms": ".4f"}
    for row in rows:
        predicted, errors, missed = row.predicted, row.errors(), row.missed()
        cells = [
            f"{row.measured[key]:{form}} {predicted[key]:{form}}"
            f" {errors[key]:+.1%}{'*' if key in missed else ' '}"
            if key in row.measured
            else ""
            for key, form in formats.items()
        ]
        made.add_row(row.cell, row.name, *cells)
    return made


def main() -> None:
    """Print both tables, and why what is beyond its bar is."""
    console = Console(width=170)
    rows = list(two_gpus())
    console.print(table("Two GPUs: measured, and predicted", rows))
    for row in rows:
        for key, why in row.outside.items():
            console.print(f"{row.cell}, {row.name}: {key} {why}")
    console.print(table("Four GPUs: measured, and predicted", list(four_gpus())))


if __name__ == "__main__":
    main()

"""Writes the performance page's tables of four GPUs beside rivals: ``python docs/four_gpus.py``.

From ``benchmarks/results``; a test compares. What stands outside the marks is written by hand and
kept. Predictions are those that stood before the call.
"""

from collections.abc import Callable
from typing import Any

from marked import ROOT, filled, stored, table

PAGE = ROOT / "docs" / "performance.md"
FILE = "four_h200_rivals"
CELLS = ("dense", "forward", "moe", "qwen", "qwen_forward", "long")
MODELS = {"dense": "source's dense", "qwen": "Qwen, twelve layers", "long": "one long sequence"}
Row = dict[str, Any]


def cell(name: str, kind: str = "cells") -> list[Row]:
    """The rows of a call."""
    (found,) = (one for one in stored(FILE)[kind] if one["name"] == name)
    return found["rows"]


def is_helix(row: Row) -> bool:
    """Whether a row is of this package's partition."""
    return "m" in row["layout"]


def of_one_call(rows: list[Row]) -> list[Row]:
    """Those of the table's own call: times of different calls are not compared."""
    return [row for row in rows if "call" not in row]


def fastest(rows: list[Row]) -> Row:
    """The rival that needs the least time."""
    return min((row for row in rows if not is_helix(row)), key=lambda row: row["step_ms"])


def beside(name: str) -> list[str]:
    """Every layout, beside its prediction and, of one call, beside the fastest rival."""
    every = cell(name)
    own = of_one_call(every)
    rival = fastest(own)
    rows = []
    for row in every:
        error = row["predicted"]["step_ms"] / row["step_ms"] - 1
        known = row in own
        rows.append(
            [
                row["arm"] + ("" if known else ", earlier call"),
                str(row["layout"]["micro_batch"]),
                f"{row['step_ms']:.1f}",
                f"{row['step_ms'] / rival['step_ms']:.3f}" if known else "",
                f"{row['tokens_per_s']:,}",
                f"{row['memory_gb']:.1f}",
                f"{row['memory_gb'] / rival['memory_gb']:.2f}" if known else "",
                f"{row['tpot_ms']:.4f}" if "tpot_ms" in row else "",
                f"{row['sent_mb']:,.0f}",
                f"{row['predicted']['step_ms']:.1f}",
                f"{error:+.1%}",
            ]
        )
    heads = "micro-batch, ms, of the fastest rival's, tokens/s, GB, of its, TPOT ms, MB sent"
    return table(f"layout | {heads}, predicted ms, error", rows)


def log() -> list[str]:
    """What Megatron's own log said, beside the fastest rival in one precision."""
    rows = []
    for name, model in MODELS.items():
        call = cell(name, "referee")
        for row in call:
            same = [one for one in call if ("FP8" in one["arm"]) == ("FP8" in row["arm"])]
            rival = fastest(same)
            rows.append(
                [
                    f"{model}: {row['arm']}",
                    f"{row['step_ms']:.1f}",
                    f"{row['step_ms'] / rival['step_ms']:.3f}",
                    f"{row['memory_mib'] / 1000:.1f}",
                    f"{row['memory_mib'] / rival['memory_mib']:.2f}",
                ]
            )
    return table("layout | ms, of the fastest rival's, thousand MiB, of its", rows)


PARTS: dict[str, Callable[[], list[str]]] = {
    name: lambda name=name: beside(name) for name in CELLS
} | {"log": log}


def page(text: str) -> str:
    """The page with these tables made anew."""
    return filled(text, "four GPUs", PARTS)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

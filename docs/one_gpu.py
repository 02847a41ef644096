"""Writes what the pages performance and exactness have of one GPU: ``python docs/one_gpu.py``.

From ``benchmarks/results``; a test compares. What stands outside the marks is written by hand and
kept. "One rank alone, links modelled" is neither a measurement of several GPUs nor a prediction:
its figures stand in a table of their own.
"""

from collections.abc import Callable
from typing import Any

from marked import BY_CORE, ROOT, by_core, filled, stored, table

PAGES = [ROOT / "docs" / name for name in ("performance.md", "exactness.md")]
Row = dict[str, Any]


def core() -> list[str]:
    """The layer spec's core attention and ``prefix``, and what one is of the other."""
    results = stored("one_h200_core")
    calls = {(row["arm"], _shape(row)): row for row in results["rows"]}
    queued = {(row["arm"], _shape(row)): f"{row['training_ms']:.2f}" for row in results["queued"]}
    rows = []
    for shape in dict.fromkeys(shape for _, shape in calls):
        spec = calls.get(("spec fused", shape)) or calls["spec", shape]
        prefix = calls["prefix", shape]
        figures = [
            f"{row[name]:.{digits}f}"
            for row in (spec, prefix)
            for name, digits in (("forward_ms", 1), ("training_ms", 2), ("memory_gb", 2))
        ]
        parts = [f"{prefix[name] / spec[name]:.2f}" for name in ("training_ms", "memory_gb")]
        behind = [queued.get((arm, shape), "") for arm in ("spec", "prefix")]
        kind = "unfused" if spec["arm"] == "spec" else "fused"
        rows.append([shape, kind, *figures, *parts, *behind])
    heads = "shape, the layer spec's is | forward (ms), and backward, GB, prefix: forward (ms)"
    heads += ", and backward, GB, of the time, of the memory, the spec's queued, prefix queued"
    return table(heads, rows)


def _shape(row: Row) -> str:
    heads = f"{row['heads']}/{row['groups']}" if row["groups"] < row["heads"] else row["heads"]
    return f"{row['sequences']} x {heads} x {row['length']} x {row['channels']}"


def dense() -> list[str]:
    """The source's dense model with the layer spec's core attention and with ``auto``."""
    rows = []
    calls = stored("one_h200_dense")["rows"]
    for spec, auto in zip(calls[::2], calls[1::2], strict=True):
        shape = f"{spec['phase']}, {spec['sequences']} x {spec['length']}"
        rows.append([shape, str(spec["micro_batch"]), *by_core(spec, auto)])
    heads = f"phase and batch | micro-batch, {BY_CORE}"
    return table(heads, rows)


def near() -> list[str]:
    """Rows in bf16: how far from stock on two ranks, and from single precision."""
    results = stored("one_h200_exactness")
    rows = []
    kinds = {"packed": "", "batch": "several a micro-batch", "sequence": "one document a row"}
    for kind, row in ((kinds[name], row) for name in kinds for row in results[name]):
        names = ("to_tp2", "tp1_to_tp2", "to_fp32", "ratio")
        names += ("norms_to_tp2", "norms_tp1_to_tp2", "norms_ratio")
        figures = [
            f"{row[name]:.2f}" if name.endswith("ratio") else _power(row[name]) for name in names
        ]
        rows.append([kind or f"`{row['flag']}`", f"`{row['layout']}`", *figures])
    heads = "rows, helix 2 x 1 | losses to TP=2's, TP=1's to TP=2's, to single precision"
    heads += ", of stock's, norms to TP=2's, TP=1's to TP=2's, of stock's"
    return table(heads, rows)


def _power(number: float) -> str:
    return f"{number:.1e}".replace("e-0", "e-")


def alone() -> list[str]:
    """Rank 0 of two, alone; beside it what two GPUs gave, where the same version ran there."""
    rows = []
    for row in stored("one_rank_h200")["rows"]:
        there = row.get("two_gpus", {})
        cells = [cell for each in (row, there) for cell in (_ms(each), _gb(each))]
        error = ""
        if there:
            mean, truth = (sum(each["step_ms"]) / len(each["step_ms"]) for each in (row, there))
            error = f"{mean / truth - 1:+.1%}"
        rows.append([row["model"], row["arm"], *cells, error])
    heads = "model, layout | one rank alone (ms), GB, measured on two H200 (ms), GB, of their mean"
    return table(heads, rows)


def _ms(row: Row) -> str:
    return " and ".join(f"{ms:g}" for ms in row.get("step_ms", ()))


def _gb(row: Row) -> str:
    return f"{row['memory_mib'] / 1e3:.1f}" if "memory_mib" in row else ""


PARTS: dict[str, Callable[[], list[str]]] = {
    "core": core,
    "dense": dense,
    "alone": alone,
    "near": near,
}


def page(text: str) -> str:
    """A page with its tables of one GPU made anew."""
    return filled(text, "one GPU", PARTS)


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(page(written.read_text()))

"""Writes the performance page's tables of two GPUs in one call: ``python docs/two_gpus.py``.

From ``benchmarks/results``; a test compares. What stands outside the marks is written by hand and
kept.
"""

from collections.abc import Callable, Iterable
from typing import Any

from marked import BY_CORE, ROOT, by_core, filled, stored, table

PAGE = ROOT / "docs" / "performance.md"
LENGTHS = {
    8192: "long, rows of 8192",
    32768: "long, vocabulary gathered",
    131072: "long, rows of 131,072, vocabulary gathered",
}
KEPT = tuple(f"qwen, some layers' weights kept{which}" for which in ("", ", again", ", third call"))
Row = dict[str, Any]


def cell(name: str, file: str = "two_h200_rivals") -> list[Row]:
    """The rows of a call."""
    (found,) = (one for one in stored(file)["cells"] if one["name"] == name)
    return found["rows"]


def lengths() -> list[str]:
    """One long sequence a micro-batch, at each length, beside context parallelism."""
    calls = {length: cell(name) for length, name in LENGTHS.items()}
    rows = [
        [arms[0]["arm"].split(", sequence")[0] + _gathers(arms[0]), *_figures(arms, calls.values())]
        for arms in zip(*calls.values(), strict=True)
    ]
    heads = ", ".join(f"{length}: ms, of CP's, GB, of CP's" for length in LENGTHS)
    return table(f"layout | {heads}", rows)


def _gathers(row: Row) -> str:
    gather = row["layout"].get("gather")
    return f", `--helix-gather {gather}`" if gather else ""


def _figures(arms: Iterable[Row], calls: Iterable[list[Row]]) -> list[str]:
    """Of an arm in each call, and what they are of the call's first."""
    return [
        figure
        for row, (first, *_) in zip(arms, calls, strict=True)
        for figure in (
            f"{row['step_ms']:.1f}",
            f"{row['step_ms'] / first['step_ms']:.3f}",
            f"{row['memory_mib'] / 1e3:.1f}",
            f"{row['memory_mib'] / first['memory_mib']:.2f}",
        )
    ]


def kept() -> list[str]:
    """Gradients added up in bf16, weights of some layers kept: two calls beside Megatron-FSDP."""
    rows = []
    for number, name in enumerate(KEPT, 1):
        call = cell(name)
        for row in call:
            layers = row["layout"].get("gather_layers")
            said = row["arm"].split(",")[0] + _gathers(row)
            said += f" `--helix-gather-layers {layers}`" if layers else ""
            bf16 = "gradient_flags" in row or row["layout"].get("fsdp")
            sums = "bf16" if bf16 else "fp32"
            rows.append([f"{number}", said, sums, *_figures([row], [call])])
    return table("call, layout, sums | ms, of M-FSDP's, GB, of M-FSDP's", rows)


def forward() -> list[str]:
    """Forward passes alone beside rivals."""
    rows = []
    for model in ("source", "qwen"):
        for row in cell(f"{model} forward, beside rivals", "two_h200_matrix"):
            if "gather" in row["layout"]:  # a forward pass alone keeps nothing
                continue
            figures = [
                f"{row['step_ms']:.1f}",
                f"{row['tokens_per_s']:,}",
                f"{row['tpot_ms']:.4f}",
                f"{row['sent_mb']:,.0f}",
                f"{row['memory_gb']:.1f}",
                f"{row['mfu']:.1%}",
            ]
            rows.append([model, row["arm"], str(row["layout"]["micro_batch"]), *figures])
    return table("model, layout | micro-batch, ms, tokens/s, TPOT ms, MB sent, GB, MFU", rows)


def cores() -> list[str]:
    """The source's dense model with the layer spec's core attention and with ``auto``."""
    rows = []
    for name, said in (
        ("dense, rows of 8192", "train, 4 x 8192"),
        ("dense forward, rows of 8192", "prefill, 4 x 8192"),
        ("dense forward, rows of 2048", "prefill, 16 x 2048"),
    ):
        call = cell(name, "two_h200_matrix")
        for spec, auto in zip(call[::2], call[1::2], strict=True):
            rows.append([said, spec["arm"].split(",")[0], *by_core(spec, auto)])
    heads = f"phase and batch, layout | {BY_CORE}"
    return table(heads, rows)


PARTS: dict[str, Callable[[], list[str]]] = {
    "lengths": lengths,
    "kept": kept,
    "forward": forward,
    "cores": cores,
}


def page(text: str) -> str:
    """The page with these tables made anew."""
    return filled(text, "two GPUs", PARTS)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

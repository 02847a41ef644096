"""What the scripts share that write figures into pages, between marks that a page has for them."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@cache
def stored(file: str) -> Any:
    """A file of ``benchmarks/results``."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())


def table(heads: str, rows: list[list[str]]) -> list[str]:
    """A table of Markdown; the columns behind the ``|`` of ``heads`` are figures."""
    words, figures = (part.split(", ") for part in heads.split(" | "))
    rule = ["---"] * len(words) + ["---:"] * len(figures)
    return [*("| " + " | ".join(line) + " |" for line in ([*words, *figures], rule, *rows)), ""]


BY_CORE = "spec: ms, tokens/s, GB, MFU, auto: ms, tokens/s, GB, MFU, times as fast, of the memory"


def by_core(spec: Mapping[str, Any], auto: Mapping[str, Any]) -> list[str]:
    """The figures of :data:`BY_CORE`, of a run with either core attention."""
    figures = [
        figure
        for row in (spec, auto)
        for figure in (
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,}",
            f"{row['memory_gb']:.1f}",
            f"{row['mfu']:.1%}",
        )
    ]
    faster = f"{spec['step_ms'] / auto['step_ms']:.3f}"
    return [*figures, faster, f"{auto['memory_gb'] / spec['memory_gb']:.2f}"]


def filled(text: str, mark: str, parts: Mapping[str, Callable[[], list[str]]]) -> str:
    """A page, made anew between its ``<!-- MARK: PART -->`` and ``<!-- MARK end -->``."""

    def made(found: re.Match[str]) -> str:
        begin, part, end = found.groups()
        return "\n".join([begin, "", *parts[part](), end])

    marked = rf"^(<!-- {mark}: (\w+) -->)$.*?^(<!-- {mark} end -->)$"
    return re.sub(marked, made, text, flags=re.M | re.S)

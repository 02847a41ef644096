"""What ``mkdocs build`` asks: the order of the pages."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIRST = (
    *("index", "getting_started", "method", "flags", "exactness", "planner", "performance"),
    "measuring",
)
LAST = ("design", "contributing", "log", "changelog")


def on_config(config: Any) -> Any:
    """Pages in reading order; a page that no list names stands between."""
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    middle = sorted(names - {*FIRST, *LAST})
    order = [name for name in (*FIRST, *middle, *LAST) if name in names]
    config.nav = [f"{name}.md" for name in order]
    return config

"""The performance page, as tests of its figures read it."""

from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
WORDS = " ".join(PAGE.split())
Rows = dict[str, dict[str, Any]]


def rows(script: ModuleType, *of: str) -> Rows:
    """Of a call that the script has tables of, by arm."""
    return {row["arm"]: row for row in script.cell(*of)}

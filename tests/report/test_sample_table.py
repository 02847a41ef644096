"""What models said while they were trained, in a report."""

from typing import Any

from megatron_helix.report import counted


def result(name: str, text: str, step: int = 2) -> dict[str, Any]:
    said = {"step": step, "prompt": "def f(\n", "text": text}
    return {"name": name, "model": "tiny", "samples": [said, {**said, "step": 10}]}


def test_layouts_that_say_the_same_share_a_row() -> None:
    table = counted._sample_table([result("stock", "x|"), result("helix", "x|"), {"model": "tiny"}])
    assert table["rows"] == [
        ["tiny", "2", r"'def f(\n'", "'x|'", "stock, helix"],
        ["tiny", "10", r"'def f(\n'", "'x|'", "stock, helix"],
    ]
    apart = counted._sample_table([result("stock", "x"), result("helix", "y" * 100)])
    assert [row[-1] for row in apart["rows"]] == ["stock", "helix"] * 2
    assert {len(row[3]) for row in apart["rows"]} == {len("'x'"), counted.SHOWN + 2}

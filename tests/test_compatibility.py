"""The compatibility table: what it says is so."""

import ast
from pathlib import Path

import pytest

from megatron_helix import arguments, compatibility
from megatron_helix.compatibility import REFUSED, WORKS, Refused, Works
from tests.distributed import tiny_gpt

ROOT = Path(__file__).parents[1]


def flags_of(row: Refused) -> list[list[str]]:
    """Every form of the flag that must be refused."""
    return [[row.flag, value] for value in row.values] or [[row.flag], [row.flag, "2"]]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.feature)
def test_what_the_table_refuses_is_refused(row: Refused, corpus_prefix: Path) -> None:
    for flags in flags_of(row):
        argv = tiny_gpt(corpus_prefix, "--helix-m", "2", "--helix-n", "2", *flags)
        with pytest.raises(ValueError, match=rf"^{row.flag}.*: is refused .*; leave it away, or"):
            arguments.complete(argv, 4)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.feature)
def test_nothing_is_refused_to_stock_megatron(row: Refused, corpus_prefix: Path) -> None:
    for flags in flags_of(row):
        arguments.complete(tiny_gpt(corpus_prefix, *flags), 4)
        arguments.complete(tiny_gpt(corpus_prefix, "--helix-m", "1", "--helix-n", "4", *flags), 4)


@pytest.mark.parametrize("row", [row for row in REFUSED if row.values], ids=lambda row: row.feature)
def test_other_values_of_a_flag_are_not_refused(row: Refused, corpus_prefix: Path) -> None:
    argv = tiny_gpt(corpus_prefix, "--helix-m", "2", "--helix-n", "2", row.flag, "another")
    arguments.complete(argv, 4)


@pytest.mark.parametrize("row", [row for row in WORKS if row.test], ids=lambda row: row.feature)
def test_what_the_table_says_works_has_the_test_it_names(row: Works) -> None:
    assert row.test
    file, name = row.test.split("::")
    functions = [
        node.name
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


def test_what_has_no_test_says_that_it_was_not_run() -> None:
    assert all("not run" in row.note for row in WORKS if not row.test)


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "compatibility.md").read_text() == compatibility.page()

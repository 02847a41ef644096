"""The table of Megatron's flags: every name has a row, and what a row says is so."""

import argparse
import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelConfig

from megatron_helix import pretrain_gpt
from megatron_helix.options import arguments, parsed
from megatron_helix.options.features import apart, page
from megatron_helix.options.features.check import needs_order, require_compatible
from megatron_helix.options.features.models import MODELS
from megatron_helix.options.features.refused import REFUSED, REFUSED_BY_LAYER
from megatron_helix.options.features.rows import InOrder, Refused, RefusedByLayer, Works
from megatron_helix.options.features.works import DRAWN, IN_ORDER, WORKS
from tests import block_case
from tests.cpu_config import cpu_config
from tests.distributed import pretrain, tiny_gpt

ROOT = Path(__file__).parents[2]

PARSER = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
ACTIONS = {word: action for action in PARSER._actions for word in action.option_strings}
# A layer spec, a YAML file or a checkpoint can set what no flag sets.
FIELDS = {
    field.name
    for config in (TransformerConfig, GPTModelConfig)
    for field in dataclasses.fields(config)
}
UNFLAGGED = FIELDS - {action.dest for action in ACTIONS.values()}

# Rows of a feature that has a row of its own but for some values of the flag.
SOME_VALUES = [row for row in REFUSED if row.values]


def name_of(word: str) -> str:
    """Where Megatron keeps what a flag sets; of a field, itself."""
    return ACTIONS[word].dest if word.startswith("--") else word


def classes() -> Counter[str]:
    """How many classes each flag (by what it sets) and field has."""
    rows = [row.names.split() for row in (*WORKS, *apart.APART)]
    rows += [[*([] if row in SOME_VALUES else [row.asks]), *row.parts.split()] for row in REFUSED]
    # A flag may be written in more than one way, a field be set by a flag of the same row.
    found = Counter(name for row in rows for name in {name_of(word) for word in row})
    for row in SOME_VALUES:
        choices = {str(getattr(choice, "name", choice)) for choice in ACTIONS[row.asks].choices}
        if choices - {"none"} <= set(row.values):
            found[name_of(row.asks)] += 1
    return found


def test_every_flag_and_field_of_megatrons_has_one_class() -> None:
    found = classes()
    names = {action.dest for action in ACTIONS.values()} | UNFLAGGED
    assert not names - found.keys(), "flags or fields without a class"
    assert not {name for name, count in found.items() if count > 1}, "more than one class"
    assert len(names) > 800


def test_the_table_has_no_name_that_megatron_has_not() -> None:
    words = [word for row in (*WORKS, *apart.APART) for word in row.names.split()]
    words += [word for row in REFUSED for word in (row.asks, *row.parts.split())]
    words += [row.asks for row in IN_ORDER]
    assert not [word for word in words if word not in ACTIONS and word not in UNFLAGGED]
    fields = {action.dest for action in ACTIONS.values()} | FIELDS
    assert not [row for row in (*REFUSED, *IN_ORDER) if row.field not in fields]


def flags_of(row: Refused) -> list[list[str]]:
    """Every form of the flag that must be refused; none where only a config says it."""
    if not row.asks.startswith("--"):
        return []
    action = ACTIONS[row.asks]
    if row.values:
        given = list(row.values)
    elif action.nargs == 0:
        return [[row.asks]]
    else:
        given = [str(getattr(c, "value", c)) for c in action.choices or ["2"]]
    return [form for value in given for form in ([row.asks, value], [f"{row.asks}={value}"])]


# Megatron's validation makes the field of these from the flag.
DERIVED = ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
FLAGGED = [row for row in REFUSED if flags_of(row) and row.field not in DERIVED]


@pytest.mark.parametrize("row", FLAGGED, ids=lambda row: row.feature)
def test_what_the_table_refuses_is_refused(row: Refused, corpus_prefix: Path) -> None:
    for flags in flags_of(row):
        argv = tiny_gpt(corpus_prefix, "--helix-m", "2", "--helix-n", "2", *flags)
        with pytest.raises(ValueError, match=rf"^{row.asks}.*: is refused .*; leave it away, or"):
            parsed.require_flags(arguments.complete(argv, 4))


@pytest.mark.parametrize(
    "row",
    [row for row in FLAGGED if row.asks != "--use-megatron-fsdp"],  # which no CPU runs
    ids=lambda row: row.feature,
)
def test_nothing_is_refused_to_stock_megatron(row: Refused, corpus_prefix: Path) -> None:
    for flags in flags_of(row):
        for layout in ((), ("--helix-m", "1", "--helix-n", "4")):
            argv = tiny_gpt(corpus_prefix, *layout, *flags)
            parsed.require_flags(arguments.complete(argv, 4))


def test_a_refusal_comes_before_any_rank_is_started(corpus_prefix: Path) -> None:
    argv = tiny_gpt(corpus_prefix, "--helix-m", "2", "--helix-n", "2", "--qk-clip")
    with pytest.raises(ValueError, match=r"^--qk-clip: is refused under --helix-m > 1: it scales"):
        pretrain_gpt.prepare(argv, 4)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.feature)
def test_a_config_or_parsed_arguments_are_refused_alike(row: Refused) -> None:
    """A layer spec, a YAML file or a checkpoint sets fields without a flag."""
    for value in row.values or (2,):
        source = SimpleNamespace(**{row.field: value})
        with pytest.raises(ValueError, match=rf"^{row.asks} {value}: is refused .*; leave it away"):
            require_compatible(argparse.Namespace(), source)
    for value in (None, False, 0, "", "none", [], row.off):
        require_compatible(SimpleNamespace(**{row.field: value}))


def test_nothing_is_refused_of_what_megatron_does_by_default() -> None:
    require_compatible(
        PARSER.parse_args([]), cpu_config(num_layers=1, hidden_size=8, num_attention_heads=1)
    )


@pytest.mark.parametrize("row", SOME_VALUES, ids=lambda row: row.feature)
def test_other_values_of_a_flag_are_not_refused(row: Refused) -> None:
    for choice in ACTIONS[row.asks].choices:
        if str(getattr(choice, "name", choice)) not in row.values:
            require_compatible(SimpleNamespace(**{row.field: choice}))


@pytest.mark.parametrize("row", IN_ORDER, ids=lambda row: row.asks)
def test_what_decides_by_the_tokens_of_a_rank_keeps_their_order(
    row: InOrder, corpus_prefix: Path
) -> None:
    for value in row.values or ("2",):
        flags = ("--helix-m", "2", "--helix-n", "2", "--sequence-parallel", row.asks, value)
        weights = ("--helix-exchange", "weights", "--helix-split")
        arguments.complete(tiny_gpt(corpus_prefix, *flags, *weights, "sequence"), 4)
        arguments.complete(tiny_gpt(corpus_prefix, *flags), 4)
        message = rf"--helix-exchange: weights with --helix-split batch .* {row.asks} {value} needs"
        with pytest.raises(ValueError, match=message):
            arguments.complete(tiny_gpt(corpus_prefix, *flags, *weights, "batch"), 4)
        assert needs_order(SimpleNamespace(**{row.field: value})) == f"{row.asks} {value}"
    assert needs_order(PARSER.parse_args([])) is None


def test_a_row_that_is_drawn_has_an_example_of_each_of_its_flags() -> None:
    for row in WORKS:
        if row.test != DRAWN:
            continue
        words = {word for example in row.examples for word in example.split()}
        assert not [word for word in row.names.split() if word[:2] == "--" and word not in words]


def test_every_example_is_of_flags_that_megatron_has() -> None:
    for row in WORKS:
        for example in row.examples:
            PARSER.parse_args(example.split())


def test_the_lists_of_models_and_runs_name_the_same_tests() -> None:
    assert {row.test for row in MODELS} & {row.test for row in WORKS if row not in MODELS} >= {
        DRAWN
    }


@pytest.mark.parametrize("row", [*WORKS, *REFUSED_BY_LAYER], ids=lambda row: row.feature)
def test_what_the_table_says_has_the_test_it_names(row: Works | RefusedByLayer) -> None:
    file, name = row.test.split("::")
    functions = [
        node.name
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


def test_what_a_checkpoint_asks_for_is_refused_too(corpus_prefix: Path, tmp_path: Path) -> None:
    """One line before any process group, though the flags alone are fine."""
    saved = tmp_path / "one_group"
    model = ("--group-query-attention", "--num-query-groups", "1")
    save = ("--save", str(saved), "--save-interval", "1")
    pretrain(tiny_gpt(corpus_prefix, *model, *save, train_iters=1), 1)
    flags = (
        *("--helix-device", "cpu", "--helix-m", "2", "--helix-n", "2", "--sequence-parallel"),
        *("--use-checkpoint-args", "--load", str(saved), "--micro-batch-size", "4", "--mock-data"),
        *("--train-iters", "1", "--lr", "1e-3", "--vocab-size", "256"),
        *("--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", "0"),
    )
    found = subprocess.run(
        [sys.executable, "-m", "megatron_helix.pretrain_gpt", *flags],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    said = r"^error: --helix-n: must be a positive divisor of --num-query-groups \(1\), got 2; use"
    assert re.match(said, found.stderr.splitlines()[-1])


def test_another_entry_point_is_checked_as_well() -> None:
    """`enable()` checks parsed arguments, whoever parsed them."""
    args = SimpleNamespace(
        helix_exchange="auto",
        helix_split="auto",
        helix_gather="microbatch",
        helix_gather_layers=None,
        helix_core_attention="spec",
        helix_phase="train",
        **{"helix_m": 2, "helix_n": 2, "micro_batch_size": 2, "global_batch_size": 4},
        **{"context_parallel_size": 1, "tensor_model_parallel_size": 4},
        pipeline_model_parallel_size=1,
        **{"position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False},
        **{"attention_output_gate": False},
    )
    block = block_case.Block()
    transformer = cpu_config(
        num_layers=1, hidden_size=32, num_attention_heads=block.heads, kv_channels=8
    )
    transformer.fp8_dot_product_attention = True
    config = SimpleNamespace(transformer=transformer)
    with pytest.raises(ValueError, match=r"^fp8_dot_product_attention: is refused"):
        parsed.require_run(argparse.Namespace(**vars(args)), config)
    args.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match=r"must be --helix-m x --helix-n, got 2 and 2 x 2; give"):
        parsed.require_run(argparse.Namespace(**vars(args)), config)


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "compatibility.md").read_text() == page.page()

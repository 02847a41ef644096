"""Flags that nobody has, found without Megatron's parser."""

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_helix.options.flags import add_helix_arguments
from megatron_helix.options.spelling import is_flag, require_spelt


def test_every_spelling_of_a_flag_is_known() -> None:
    parser = add_helix_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    spellings = [word for action in parser._actions for word in action.option_strings]
    assert len(spellings) > 800
    assert not [word for word in spellings if not is_flag(word)]
    require_spelt([*spellings, "--num-layers=2", "--", "-1", "word"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--helix-exchnge", r"--helix-exchnge: must be .*, and is none; is --helix-exchange meant"),
        ("--num-layer=2", r"--num-layer: .*; is --num-layers meant\?"),
        ("--no-num-layers2", r"--no-num-layers2: must be a flag of Megatron's or helix's"),
        ("--xyzzy", r"--xyzzy: .*, and is none; correct it, or leave it away"),
    ],
)
def test_an_unknown_flag_is_refused_and_near_ones_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        require_spelt(["--num-layers", "2", word])


def test_a_script_of_megatrons_may_know_other_flags() -> None:
    require_spelt(["--xyzzy", "4"], script=True)
    with pytest.raises(ValueError, match=r"^--helix-o: must be a flag"):
        require_spelt(["--helix-o", "4"], script=True)

"""Flags that are spelt as no flag is: refused before the imports that take seconds.

Megatron's are known from the table of features, which has every one of them.
"""

import argparse
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache

from megatron_helix.basics.errors import UserError
from megatron_helix.options.features.apart import APART
from megatron_helix.options.features.refused import REFUSED
from megatron_helix.options.features.works import WORKS
from megatron_helix.options.flags import add_helix_arguments

_OURS = "--helix-"
_NOT = ("--no-", "--disable-")  # how Megatron spells that a flag is off


def require_spelt(argv: Sequence[str], *, script: bool = False) -> None:
    """Refuse a flag that neither Megatron nor helix has.

    Args:
        argv: the user's flags.
        script: whether a script of Megatron-LM's own reads them, which may know others: then
            helix's alone are looked at.

    Raises:
        UserError: naming it, and the flag that is spelt most like it.
    """
    for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if (script and not name.startswith(_OURS)) or is_flag(name):
            continue
        near = get_close_matches(name, [*_helixs(), *_megatrons()], n=1, cutoff=0.75)
        raise UserError(
            f"{name}: must be a flag of Megatron's or helix's, and is none;"
            f" {f'is {near[0]} meant?' if near else 'correct it, or leave it away'}"
        )


def is_flag(name: str) -> bool:
    """Whether a word is ``--``, or a flag in any spelling that Megatron's parser takes."""
    spellings = [name]
    for no in (no for no in _NOT if name.startswith(no)):
        spellings += [f"--{name.removeprefix(no)}", f"--no-{name.removeprefix(no)}"]
    return name == "--" or any(one in _helixs() or one in _megatrons() for one in spellings)


@cache
def _helixs() -> frozenset[str]:
    parser = add_helix_arguments(argparse.ArgumentParser(add_help=False))
    return frozenset(word for action in parser._actions for word in action.option_strings)


@cache
def _megatrons() -> frozenset[str]:
    return frozenset(word for word in _names() if word.startswith("--"))


def _names() -> Iterator[str]:
    for row in (*WORKS, *APART):
        yield from row.names.split()
    for row in REFUSED:
        yield from (row.asks, *row.parts.split())

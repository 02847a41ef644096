"""The rows of the table, and how a row is read off parsed arguments and configs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_OFF = (None, False, 0, "", "none")


@dataclass(frozen=True, kw_only=True)
class Works:
    """A feature that gives stock's numbers under helix.

    Attributes:
        feature: its name.
        names: those of the flags that make it, and of config fields that no flag sets.
        test: the test that shows it, ``file::function``.
        examples: words that turn the feature on in a small model, one string each; what the fuzzer
            draws from (:mod:`megatron_helix.fuzz`).
        needs: what a case must have for them, in the words of
            :attr:`megatron_helix.fuzz.case.Case.tags`.
        note: what a user should know.
    """

    feature: str
    names: str
    test: str
    examples: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A feature that is refused before any process group exists, wherever m > 1.

    Attributes:
        feature: its name.
        asks: the flag that asks for it; a config field where no flag does.
        field: where parsed arguments or a config keep it.
        reason: why, continuing "is refused:".
        values: the values that are refused; empty for all that turn the feature on.
        off: a value that leaves it off, beside those that are false.
        parts: names that are read only where the feature is on.
    """

    feature: str
    asks: str
    field: str
    reason: str
    values: tuple[str, ...] = ()
    off: Any = None
    parts: str = ""

    def asked_of(self, source: Any) -> Any:
        """The value by which parsed arguments or a config ask for the feature; None if they don't.

        Args:
            source: a Namespace or a config object.
        """
        return asked(source, self.field, self.values, self.off)


@dataclass(frozen=True, kw_only=True)
class RefusedByLayer:
    """What no flag of Megatron's asks for: refused where layers are made or called.

    Attributes:
        feature: its name.
        where: what meets it.
        reason: why.
        test: the test that shows the refusal, ``file::function``.
    """

    feature: str
    where: str
    reason: str
    test: str


@dataclass(frozen=True, kw_only=True)
class InOrder:
    """What decides by which tokens lie on a rank, or by their order: it needs stock's order.

    ``weights`` with a batch split keeps another one between the layers.

    Attributes:
        asks: the flag.
        field: where parsed arguments keep it.
        reason: what it decides.
        values: the values that do; empty for all that turn it on.
    """

    asks: str
    field: str
    reason: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Flags that cannot interact with the partition.

    Attributes:
        what: the class they are of.
        reason: why nothing of theirs meets a tile, an exchange or the order of tokens.
        names: the flags, and config fields that no flag sets.
    """

    what: str
    reason: str
    names: str


def asked(source: Any, field: str, values: Iterable[str] = (), off: Any = None) -> Any:
    """The value of ``field`` in ``source`` that turns a feature on; None where it is off.

    Args:
        source: a Namespace or a config object, which may lack the field.
        field: its name.
        values: those that turn it on; empty for all that are not false, ``none`` or ``off``.
        off: one more value that leaves it off.
    """
    found = getattr(source, field, None)
    for value in found if isinstance(found, (list, tuple)) else (found,):
        if values:
            if str(getattr(value, "name", value)) in values:
                return value
        elif value not in _OFF and value != off:
            return value
    return None

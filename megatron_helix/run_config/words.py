"""Names and values as the words of a command line."""

from typing import Any


def valued(**values: Any) -> list[str]:
    """``name=value`` as ``--name value``, dashes for underscores, a pair as ``(a,b)``.

    What is None or False is left out.
    """
    return [
        word
        for name, value in values.items()
        if value is not None and value is not False
        for word in (*switch(name), _written(value))
    ]


def switch(name: str) -> list[str]:
    """The flag of a name, without a value."""
    return [f"--{name.replace('_', '-')}"]


def _written(value: Any) -> str:
    return f"({','.join(map(str, value))})" if isinstance(value, tuple) else str(value)

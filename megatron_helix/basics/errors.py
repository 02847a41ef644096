"""A mistake of the user's, and how a command ends with it: one line on standard error, once."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

PATIENCE_S = 30.0  # of a rank for rank 0, which imports as long as it does and may be slower


class UserError(ValueError):
    """What was asked for cannot be; the text says what is wrong and what to do.

    It ends a command in one line. Any other ``ValueError`` is a fault of the program: it ends in a
    trace.
    """


@contextlib.contextmanager
def told() -> Iterator[None]:
    """End this process with one line and exit code 2 for a mistake of the user's in here."""
    try:
        yield
    except UserError as error:
        leave(error, 2)


def leave(error: object, code: int) -> NoReturn:
    """Say ``error`` in one line and end this process.

    Of the ranks of one run, rank 0 speaks. torchrun ends them all as soon as one has ended, said or
    not said: under it the others wait to be ended. One that nobody ends is mistaken alone, and
    speaks.

    Raises:
        SystemExit: with ``code``.
    """
    line, rank = f"error: {error}", os.environ.get("RANK", "0")
    if rank != "0":
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(code)
        time.sleep(PATIENCE_S)
        line = f"error: rank {rank}: {error}"
    _tell_torchrun(line)
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def _tell_torchrun(line: str) -> None:
    """What torchrun has to say of a rank that failed, below its own trace."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(file, "w") as out:
            json.dump({"message": said}, out)

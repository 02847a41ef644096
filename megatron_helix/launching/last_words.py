"""What ended a rank, told to the process that waits for it.

A rank that loses a peer fails as well, and a moment later: whoever spoke first is the cause.
"""

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

_LONGEST = 500  # characters: what one write puts into a pipe whole is 4 KiB


class LastWords:
    """A pipe from the ranks of a run to the process that forks them, which makes it before."""

    def __init__(self) -> None:
        self._here, self._there = get_context("fork").Pipe(duplex=False)
        self._heard: dict[int, str] = {}

    def of(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """``target``, on a rank, which tells the exception that it ends by."""

        def telling(*args: Any) -> None:
            try:
                target(*args)
            except BaseException as error:
                self._there.send((int(os.environ["RANK"]), _line(error)))
                raise

        return telling

    def heard(self) -> dict[int, str]:
        """What ranks have told until now, the first to speak first."""
        while self._here.poll():
            rank, line = self._here.recv()
            self._heard.setdefault(rank, line)
        return self._heard

    def close(self) -> None:
        """Give up both ends."""
        self._here.close()
        self._there.close()


def _line(error: BaseException) -> str:
    """An exception in one line; of an exit, the mistake that it tells, if it tells one."""
    if isinstance(error, SystemExit):
        return _line(error.__context__) if error.__context__ else ""
    text = " ".join(str(error).split())[:_LONGEST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

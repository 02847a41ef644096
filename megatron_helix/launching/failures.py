"""How a run ends that does not get its work done."""

import signal
from pathlib import Path


class RunFailed(RuntimeError):
    """A run ended before its work was done."""


class RunTimeoutError(RunFailed, TimeoutError):
    """A run was not done in time."""


class RankFailed(RunFailed):
    """A rank ended before its work was done.

    Attributes:
        rank: the first rank that ended.
        exitcode: its exit code; the negative of a signal's number if that ended it.

    Args:
        rank: that rank.
        world_size: ranks of the run.
        exitcode: of the rank.
        log: that took its output, if one did.
        said: the exception that ended it, in a line; nothing where it told none.
    """

    def __init__(self, rank: int, world_size: int, exitcode: int, log: Path | None, said: str = ""):
        self.rank, self.exitcode = rank, exitcode
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else "failed"
        where = f"; its output is in {log}" if log else ""
        super().__init__(
            f"rank {rank} of {world_size} {how} (exit code {exitcode}){said and f': {said}'};"
            f" the other ranks were ended{where}"
        )

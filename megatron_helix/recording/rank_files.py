"""The file of lines that a rank of a run writes, and who may write it.

A run that goes on where a dead one stopped writes on behind what that one measured. Two runs at
once would mix their lines: a rank's file is locked while its rank lives.
"""

import fcntl
import os
from pathlib import Path
from typing import IO

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError


def require_free(folder: Path, rank: int) -> None:
    """Check that no other run writes this rank's lines now.

    Raises:
        UserError: naming the folder and what to do.
    """
    path = files.of_rank(folder, rank, ".jsonl")
    if path.exists():
        with path.open("r+") as file:
            _lock(file, path)


def append(folder: Path, rank: int) -> IO[str]:
    """A rank's file of lines, for this process alone until it ends, to write behind what is there.

    What a run that died left of its last line goes. The lock is the process's own, not handed on to
    what it forks: a worker that outlives its rank keeps no restart out.

    Raises:
        UserError: where another run writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = files.of_rank(folder, rank, ".jsonl")
    file = path.open("a+")
    _lock(file, path)
    file.seek(0)
    kept = file.read().rpartition("\n")
    os.truncate(path, len((kept[0] + kept[1]).encode()))
    return file


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"--helix-metrics: must be a folder that no other run writes into, and one holds"
            f" {path}; give another folder, or wait until that run has ended"
        ) from None

"""Files that a later run reads: written in one piece, read with an error that says what to do."""

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError


def write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever this process or the machine ends.

    Args:
        path: of the file, in a folder that exists.
        text: all of it.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
        replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace(unfinished: Path, path: Path) -> None:
    """Give a file that is written its name, once all of it is on the disk."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_json(path: Path, remedy: str) -> Any:
    """The JSON value in a file.

    Args:
        path: of the file.
        remedy: what to do if it cannot be read.

    Raises:
        UserError: for a file that was torn or edited.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: was torn or edited, and is not JSON ({error}); {remedy}"
        ) from None


def of_rank(folder: Path, rank: int, ending: str) -> Path:
    """The file of one rank with this ending."""
    return folder / f"rank{rank:02d}{ending}"


def of_ranks(folder: Path, ending: str) -> list[Path]:
    """The files ``rank00`` and so on with this ending, in the order of the ranks."""
    named = {
        file: re.fullmatch(rf"rank(\d+){re.escape(ending)}", file.name) for file in _in(folder)
    }
    ranks = {int(match[1]): file for file, match in named.items() if match}
    return [ranks[rank] for rank in sorted(ranks)]


def _in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def make_folder(folder: Path, field: str) -> None:
    """Make a folder, with those above it.

    Args:
        folder: that may be there already.
        field: what named it, for the error.

    Raises:
        UserError: when something else is there, or it may not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{field}: {folder} must be a folder that can be made: {error.strerror}; name another"
        ) from None


def require_place(path: Path, field: str) -> None:
    """Check that a file can be made, before the work that it is to hold; makes nothing.

    Args:
        path: of the file; its folder need not be there.
        field: what named it, for the error.

    Raises:
        UserError: when nothing can be written in the folder, or in the one that it is to be in.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        make_folder(path.parent, field)  # which says why not
    _require_writable(folder, field)


def make_writable(folder: Path, field: str) -> None:
    """Make a folder that can be written into; arguments and errors as for :func:`make_folder`."""
    make_folder(folder, field)
    _require_writable(folder, field)


def _require_writable(folder: Path, field: str) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{field}: {folder} must be a folder to write in: {error.strerror}; name another"
        ) from None


@contextlib.contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """Hold a folder for this process; made if missing. The lock goes with the process.

    Args:
        folder: to hold.
        field: what named it, for the error.

    Raises:
        UserError: when another process holds it, or it cannot be made.
    """
    make_folder(folder, field)
    try:
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"{field}: {folder} must be a folder to write in: {error.strerror}; name another"
        ) from None
    with lock:
        try:
            # Of the process, not of the file descriptor, which forked ranks inherit.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"{field}: {folder} must be used by one run at a time, and process"
                f" {lock.read().strip() or 'unknown'} is at work in it; wait for it or give another"
                " folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield

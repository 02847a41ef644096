"""What a rank writes, line by line, while it runs."""

import re
from collections.abc import Callable
from pathlib import Path


class Follower:
    """Tells the lines of a growing file that a pattern is found in.

    Args:
        file: that need not be there yet.
        pattern: of the lines.
        tell: called with each of them, without blanks around it.
    """

    def __init__(self, file: Path, pattern: str, tell: Callable[[str], object]):
        self.file, self.pattern, self.tell = file, re.compile(pattern), tell
        self._read = 0
        self._unfinished = b""

    def __call__(self) -> None:
        """Look for what is new."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._unfinished = (self._unfinished + new).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").strip()
            if self.pattern.search(text):
                self.tell(text)

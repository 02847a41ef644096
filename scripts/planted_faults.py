"""Plants faults in a copy of the code, one at a time: the tests named beside each must see it.

The faults are in ``planted_faults.yaml``. The checkout itself is never touched.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.table import Table

from megatron_helix.run_config.files import loaded

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120
CAUGHT, MISSED, HUNG, BROKEN = "caught", "missed", "hung", "broken entry"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One wrong line.

    Attributes:
        name: a few words.
        file: whose line it is, from the root.
        before: the line as it is, without its indentation.
        after: the wrong one.
        tests: arguments of pytest, those that should see it.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted(self, root: Path) -> str:
        """The text of the file with the wrong line.

        Raises:
            SystemExit: where the line is not there exactly once.
        """
        lines = (root / self.file).read_text(encoding="utf-8").splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if line.strip() == self.before]
        if len(places) != 1:
            sys.exit(
                f"error: {self.name}: the code has moved: {self.file} has {len(places)} lines"
                f" {self.before!r}, needs 1; correct scripts/planted_faults.yaml"
            )
        (place,) = places
        lines[place] = lines[place].replace(self.before, self.after)
        return "".join(lines)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault: the test that saw it, or what pytest said last instead."""

    status: str
    said: str
    seconds: float


def load(words: list[str]) -> list[Fault]:
    """The faults whose names contain one of ``words``; all without any."""
    text = (ROOT / "scripts" / "planted_faults.yaml").read_text(encoding="utf-8")
    faults = [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in loaded(text)]
    names = [fault.name for fault in faults]
    twice = {name for name in names if names.count(name) > 1}
    unknown = [word for word in words if not any(word in name for name in names)]
    if twice or unknown:
        sys.exit(f"error: no fault of that name: {unknown}, or more than one: {sorted(twice)}")
    return [fault for fault in faults if not words or any(word in fault.name for word in words)]


def copy_checkout(to: Path) -> None:
    """Copy what git tracks or would."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # a deleted file is listed until that is committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    found = python(to, "-c", "import megatron_helix as m; print(m.__file__)")
    if not Path(found.stdout.strip()).is_relative_to(to):
        sys.exit(f"error: megatron_helix comes from {found.stdout.strip()}, not from {to}")


def python(root: Path, *words: str, timeout: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run this Python in a copy, on the copy's package.

    Raises:
        subprocess.TimeoutExpired: past ``timeout`` seconds, when all that it started has ended.
    """
    # No bytecode: two wrong lines of one length in one second would count as one file.
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    with subprocess.Popen(
        command,
        cwd=root,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, which hold the pipe open
            raise
    return subprocess.CompletedProcess(command, process.returncode, said)


def pytest(root: Path, tests: tuple[str, ...], timeout: float = LIMIT_S) -> Outcome:
    """Run tests in a copy until one fails."""
    start = time.monotonic()
    words = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not thorough", *tests)
    try:
        done = python(root, *words, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome(status=HUNG, said=f"no end in {timeout} s", seconds=timeout)
    seconds = time.monotonic() - start
    # A fixture that fails is not the test that should see it.
    failed = re.search(r"^FAILED (\S+?::\w+(?:\[.*?\](?= - |$))?)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return Outcome(status=CAUGHT, said=failed[1], seconds=seconds)
    last = done.stdout.strip().rpartition("\n")[2]
    return Outcome(status=BROKEN if done.returncode else MISSED, said=last, seconds=seconds)


def attempt(fault: Fault, copies: "SimpleQueue[Path]") -> Outcome:
    """Plant a fault in a copy that nobody uses, run its tests, take it out again."""
    root = copies.get()
    file = root / fault.file
    whole, wrong = file.read_bytes(), fault.planted(root)
    try:
        file.write_text(wrong, encoding="utf-8")
        return pytest(root, fault.tests)
    finally:
        file.write_bytes(whole)
        copies.put(root)


def table(outcomes: dict[Fault, Outcome]) -> Table:
    """What saw each fault."""
    shown = Table("fault", "file", "tests", "caught by", "s")
    for fault, outcome in outcomes.items():
        said = outcome.said if outcome.status == CAUGHT else f"{outcome.status}: {outcome.said}"
        style = None if outcome.status == CAUGHT else "red"
        words = " ".join(fault.tests).replace("tests/", "")
        file = fault.file.removeprefix("megatron_helix/")
        cells = (fault.name, file, words, said.removeprefix("tests/"), f"{outcome.seconds:.0f}")
        shown.add_row(*(cell.replace("[", r"\[") for cell in cells), style=style)
    return shown


def main() -> int:
    """Run what the command line asks for; 0 if every fault was caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="faults whose names contain one of these; all")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, a copy for each")
    parser.add_argument("--clean", action="store_true", help="first the same tests, no fault")
    args = parser.parse_args()
    console = Console()
    faults = load(args.names)
    for fault in faults:
        fault.planted(ROOT)  # that the code has moved is said before anything is run
    with tempfile.TemporaryDirectory(prefix="planted_faults") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            root = Path(folder, str(number)).resolve()
            copy_checkout(root)
            copies.put(root)
        if args.clean:
            root = copies.get()
            for tests in dict.fromkeys(fault.tests for fault in faults):
                clean = pytest(root, tests)
                if clean.status != MISSED:
                    sys.exit(f"error: without a fault: {' '.join(tests)}: {clean.said}")
            copies.put(root)
        outcomes: dict[Fault, Outcome] = {}
        with ThreadPoolExecutor(args.jobs) as pool:
            tried = pool.map(lambda fault: attempt(fault, copies), faults)
            for fault, outcome in zip(faults, tried, strict=True):
                outcomes[fault] = outcome
                console.print(
                    f"{len(outcomes)}/{len(faults)} {fault.name}: {outcome.status}, {outcome.said}",
                    markup=False,
                    soft_wrap=True,
                )
    console.print(table(outcomes))
    missed = [outcome for outcome in outcomes.values() if outcome.status != CAUGHT]
    console.print(f"{len(outcomes) - len(missed)} of {len(outcomes)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""One turn of ``run.py``: the process of a rank, and what it took."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_helix.recording import kernels

RANK = Path(__file__).with_name("rank.py")
WARM = 3  # first steps, which allocate and choose kernels
MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
MB = re.compile(r"max allocated: ([0-9.]+)")


@dataclass(frozen=True)
class Taken:
    """What a rank took: milliseconds of each counted step, GB, milliseconds by kind of kernel."""

    steps: list[float]
    gb: float
    kinds: dict[str, float]


@dataclass
class Turn:
    """A rank of a layout: a process that waits, imports done, until what it takes is asked for."""

    name: str
    rank: int
    folder: Path
    steps: int
    profile: bool
    flags: list[str]
    _process: subprocess.Popen[bytes] | None = None

    def begin(self, given: dict[str, str]) -> None:
        """Start the process, unless it has been started."""
        if self._process is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._gate.unlink(missing_ok=True)
        metrics = self.folder / "metrics"
        shutil.rmtree(metrics, ignore_errors=True)  # of a call before
        words = [*self.flags]
        if "--helix-phase" in words:  # which the ledger's hook makes of a step
            words += ["--helix-metrics", str(metrics)]
        if self.profile:
            words += ["--profile", "--use-pytorch-profiler", "--profile-ranks", str(self.rank)]
            words += ["--profile-step-start", str(self.steps - 2)]
            words += ["--profile-step-end", str(self.steps - 1)]
            # Megatron writes traces beside that folder.
            words += ["--tensorboard-dir", str(self.folder / "tensorboard")]
        with self._log.open("w") as text:
            self._process = subprocess.Popen(
                [sys.executable, str(RANK), *words],
                stdout=text,
                stderr=text,
                env={
                    **os.environ,
                    **given,
                    "RANK": str(self.rank),
                    "ONE_RANK_GATE": str(self._gate),
                },
            )

    def taken(self) -> Taken | None:
        """Let it train to its end; None, and the end of its log on standard error, if it fails."""
        assert self._process is not None
        self._gate.touch()
        failed = self._process.wait()
        said = self._log.read_text(errors="replace")
        last = self.steps - 2 if self.profile else self.steps
        ms = [float(found) for found in MS.findall(said)][WARM:last]
        if failed or not ms:
            print(f"{self._log}: failed with {failed}: {said[-600:]}", file=sys.stderr)
            return None
        pattern = f"**/rank-{self.rank}.json.gz"
        traces = list(self.folder.glob(pattern)) if self.profile else []
        kinds = kernels.read(traces[0]).kinds if traces else {}
        gb = max((float(found) for found in MB.findall(said)), default=0.0) / 1e3
        sums = {kind: round(found.ms, 1) for kind, found in kinds.items()}
        return Taken(ms, gb, sums)

    def stop(self) -> None:
        """End a process that still waits."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    @property
    def _gate(self) -> Path:
        return self.folder / "go"

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

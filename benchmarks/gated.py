"""A rank that has its imports behind it before its turn on the GPUs comes.

    torchrun ... -m gated GATE FLAGS ...

is ``megatron_helix.pretrain_gpt FLAGS ...`` that waits, with nothing on a GPU yet, until the file
GATE exists. :mod:`matrix_turns` opens it. A rank that is not through some minutes later hangs: it
says where in its log, and ends, so that the turns after it are not lost. One that is through ends
at once: taking a process apart that had a GPU takes seconds, in which the next turn would wait.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path

from megatron_helix import pretrain_gpt

POLL_S = 0.05
PATIENCE_S = 1200.0
TURN_S = 240.0


def main() -> None:
    """Run one rank."""
    flags = pretrain_gpt.prepare_rank(sys.argv[2:])
    wait(Path(sys.argv[1]))
    faulthandler.dump_traceback_later(TURN_S, exit=True)
    pretrain_gpt.train(flags)
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait(gate: Path) -> None:
    """Wait until the file exists; after 20 minutes end this process."""
    ends = time.monotonic() + PATIENCE_S
    while not gate.exists():
        if time.monotonic() > ends:
            sys.exit(f"{gate} was not made in {PATIENCE_S:.0f} s: the benchmark has gone")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()

"""Start the ranks of a run: forked here, with torchrun here, or with torchrun on Slurm's nodes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_helix.basics import files, signals
from megatron_helix.basics.errors import UserError
from megatron_helix.launching.failures import RunFailed
from megatron_helix.launching.fork_ranks import Ranks
from megatron_helix.launching.fork_ranks import run as fork_ranks
from megatron_helix.launching.launcher_config import LauncherConfig
from megatron_helix.options import environment

POLL_S = 0.5
TORCHRUN_S = 10.0  # for torchrun to end itself when its ranks have
# In the environment of what is started, so that all of it is found when the run is over.
_MARK = "HELIX_LAUNCHED"


@dataclass(frozen=True, kw_only=True)
class Program:
    """What every rank does.

    Attributes:
        words: module and arguments of a rank that is a process of its own.
        forked: gives function and arguments of a rank that is forked; called in the parent, before.
            None for a program that is not to be forked.
    """

    words: Sequence[str]
    forked: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]] | None = None


def require(launcher: LauncherConfig, device: str, world_size: int) -> None:
    """Refuse to start where the ranks cannot run.

    Raises:
        UserError: without Slurm's allocation for ``slurm``, or with too few GPUs for ``cuda``.
    """
    if launcher.kind == "slurm" and not (shutil.which("srun") and os.environ.get("SLURM_JOB_ID")):
        raise UserError(
            "launcher.kind: slurm needs srun and an allocation, and found none; call it from a"
            " script that sbatch has started, or use torchrun"
        )
    if device == "cuda":
        import torch  # slow

        wanted, found = world_size // launcher.nodes, torch.cuda.device_count()
        if found < wanted:
            raise UserError(
                f"device: cuda needs {wanted} GPUs on this machine, found {found}; use such a"
                " machine, or say what is to be expected of it with `helix plan`"
            )


def training(flags: Sequence[str], world_size: int) -> Program:
    """Megatron's loop.

    Args:
        flags: as for ``megatron_helix.pretrain_gpt``.
        world_size: ranks.
    """

    def forked() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from megatron_helix import pretrain_gpt

        return pretrain_gpt.train, (pretrain_gpt.prepare(flags, world_size),)

    return Program(words=["megatron_helix.pretrain_gpt", *flags], forked=forked)


def launch_command(
    launcher: LauncherConfig, words: Sequence[str], world_size: int, logs: Path
) -> list[str]:
    """The command that starts the ranks of a program's ``words``, for torchrun and Slurm.

    Under Slurm it must be called inside an allocation of ``nodes`` nodes; the first one is where
    the ranks meet.
    """
    nodes = min(launcher.nodes, world_size)
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(world_size // nodes)),
        *("--log-dir", str(logs), "--redirects", "3"),
    ]
    entry = ["-m", *words]
    if launcher.kind == "torchrun":
        return [*torchrun, "--standalone", *entry]
    meeting = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or os.environ.get("HOSTNAME", "localhost")
    job = os.environ.get("SLURM_JOB_ID", "0")
    port = str(20000 + int(job) % 20000)
    return [
        *("srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"),
        "--kill-on-bad-exit=1",
        *torchrun,
        *("--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", f"{meeting}:{port}"),
        *entry,
    ]


def launch(
    launcher: LauncherConfig,
    flags: Sequence[str],
    world_size: int,
    logs: Path,
    poll: Callable[[], Any] | None = None,
) -> None:
    """Run Megatron's loop with these flags; arguments and errors as for :func:`start`."""
    start(launcher, training(flags, world_size), world_size, logs, poll)


def start(
    launcher: LauncherConfig,
    program: Program,
    world_size: int,
    logs: Path,
    poll: Callable[[], Any] | None = None,
) -> None:
    """Run the program on ``world_size`` ranks, and wait for it.

    Args:
        launcher: what starts the ranks.
        program: what they do.
        world_size: ranks.
        logs: folder that takes their output.
        poll: called now and then meanwhile, for progress.

    Raises:
        UserError: for a program that cannot run, before any rank is started.
        RunFailed: when a rank fails; the others are ended first.
    """
    if launcher.kind == "fork":
        assert program.forked, f"{program.words[0]} cannot be forked"
        target, args = program.forked()
        ranks = Ranks(target=target, args=args, world_size=world_size, logs=logs)
        fork_ranks(ranks, poll=poll)
        return
    command = launch_command(launcher, program.words, world_size, logs)
    variables = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{signals.SAVE_GRACE_S:.0f}",  # torchrun's own is 30 s
        **os.environ,
        **environment.needed(program.words, os.environ),
    }
    with (
        files.locked(logs, "logs"),
        (logs / "launcher.log").open("w") as log,
        signals.terminate_as_interrupt(),
    ):
        _supervise(command, variables, log, poll)


def _supervise(
    command: Sequence[str], variables: dict[str, str], log: Any, poll: Callable[[], Any] | None
) -> None:
    """Wait for the command; end all it has started when this process is interrupted or killed."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        env={**variables, _MARK: mark},
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
            if poll:
                poll()
    except KeyboardInterrupt:
        _let_save(process)
        raise
    finally:
        if process.poll() != 0:  # its ranks have sessions of their own, and may have outlived it
            signals.kill_marked(_MARK, mark)
            process.wait()
    if process.returncode:
        raise RunFailed(
            f"{Path(command[0]).name}: a rank failed (exit code {process.returncode}); its output"
            f" is in {Path(log.name).parent}"
        )


def _end_with_parent() -> None:
    """Let the launcher be told to end when this process is gone, so that no rank is left over."""
    signals.end_with_parent(signal.SIGTERM)


def _let_save(process: subprocess.Popen[Any]) -> None:
    """Ask the launcher to end its ranks, and wait as long as a checkpoint may take to be saved."""
    process.terminate()
    try:
        process.wait(signals.SILENCE_S)
    except subprocess.TimeoutExpired:
        signals.tell_waiting()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(signals.SAVE_GRACE_S + TORCHRUN_S)

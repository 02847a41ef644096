"""``helix calibrate``."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_helix.basics.errors import UserError

Device = Literal["auto", "cpu", "cuda"]


def calibrate(
    out: Annotated[Path, typer.Option(help="Hardware file to write.")],
    device: Annotated[
        Device, typer.Option(help="What to measure; auto is cuda on two GPUs or more.")
    ] = "auto",
    ranks: Annotated[
        int | None, typer.Option(min=2, help="Ranks to start: by default all GPUs, or two on CPUs.")
    ] = None,
) -> None:
    """Measure GEMM rate, memory rate and links of this machine and write a hardware file.

    On GPUs with NCCL, on CPUs with gloo. For several nodes, call on each of them
    torchrun ... -m megatron_helix.planner.calibrate --out FILE.
    """
    from torch import cuda

    from megatron_helix.planner import calibrate as measuring

    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "helix calibrate: must be called once, for it starts its ranks itself, got torchrun's"
            " LOCAL_RANK; call it without torchrun, or torchrun with"
            " -m megatron_helix.planner.calibrate --out FILE"
        )
    if device == "cuda" or (device == "auto" and cuda.device_count() > 1):
        said = _on_gpus(ranks or max(2, cuda.device_count()), out)
    else:
        said = measuring.on_cpu(ranks or 2, out)
    typer.echo(f"{out}: {said}")


def _on_gpus(ranks: int, out: Path) -> str:
    """Measure with torchrun's ranks, a GPU each; one line that says what."""
    from megatron_helix.launching import launchers
    from megatron_helix.launching.launcher_config import LauncherConfig
    from megatron_helix.planner import calibrate as measuring

    torchrun = LauncherConfig(kind="torchrun")
    launchers.require(torchrun, "cuda", ranks)
    measuring.prepare(out)
    program = launchers.Program(words=["megatron_helix.planner.calibrate", "--out", str(out)])
    logs = out.with_suffix(".logs")
    launchers.start(torchrun, program, ranks, logs)
    shutil.rmtree(logs)  # of a failure they stay
    return measuring.summary(out)

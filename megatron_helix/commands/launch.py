"""``helix launch``."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def launch(
    context: typer.Context,
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    model: Annotated[str, typer.Argument(help="One of its models, by name.")],
    layout: Annotated[str, typer.Argument(help="One of its layouts, by name.")],
    nnodes: Annotated[int, typer.Option(min=1, help="Machines that share the ranks.")] = 1,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT of one node, on every node the same.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Prefix of a dataset made by helix data; else mock data.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
) -> None:
    """Train one layout of an experiment with torchrun; run it on every node.

    Flags that are not its own go on to Megatron.
    """
    from megatron_helix.basics import signals
    from megatron_helix.experiment import config, torchrun
    from megatron_helix.options import arguments, environment, folders, spelling

    chosen = config.load(experiment)
    words = torchrun.command(
        chosen,
        model,
        layout,
        nodes=torchrun.Nodes(count=nnodes, rendezvous=rdzv_endpoint),
        data=data,
        more=context.args,
    )
    spelling.require_spelt(context.args)
    if dry_run:
        unusual = environment.needed(words, {environment.CONNECTIONS: "1"})
        said = [f"{name}={value} " for name, value in unusual.items()]
        typer.echo("".join(said) + shlex.join(words))
        return
    # Here once, before any rank says it and torchrun a page about it.
    flags = arguments.complete(torchrun.flags(words), chosen.world_size)
    folders.require_loaded(flags)
    arguments.require_data(flags)
    folders.require_written(flags)
    # torchrun's own is 30 s: too little for a large checkpoint.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{signals.SAVE_GRACE_S:.0f}")
    os.environ.update(environment.needed(words, os.environ))
    # torchrun's module: its script may lie in no folder of PATH.
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words[1:]])

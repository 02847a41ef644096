"""``helix pretrain``."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_helix.commands import on_ranks
from megatron_helix.launching import fork_ranks

LOSSES = r"\biteration +\d+/|^validation loss "  # Megatron's lines, of the last rank
SAID = r"^sample after step |^helix "  # helix's, of the first


def pretrain(
    context: typer.Context,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Ranks to start.")],
    logs: Annotated[
        Path | None,
        typer.Option(help="Folder for the ranks' output; by default a temporary one, named."),
    ] = None,
) -> None:
    """Train on this machine's CPU ranks: import Megatron once, then fork the ranks.

    Shows the lines that have losses and samples; all else that ranks say is in their logs. Flags
    after -- are Megatron's and helix's, as for `torchrun -m megatron_helix.pretrain_gpt`.
    """
    from megatron_helix import pretrain_gpt
    from megatron_helix.launching.following import Follower
    from megatron_helix.options import parsed

    pretrain_gpt.help_instead(context.args)
    flags = pretrain_gpt.prepare(["--helix-device", "cpu", *context.args], nproc_per_node)
    args = parsed.require_flags(flags)
    ranks = fork_ranks.Ranks(
        target=pretrain_gpt.train,
        args=(flags,),
        world_size=nproc_per_node,
        logs=logs or Path(tempfile.mkdtemp(prefix="helix-pretrain-")),
    )
    first, last = ranks.log(0), ranks.log(nproc_per_node - 1)
    assert first
    assert last
    losses: list[str] = []

    def tell(line: str) -> None:
        losses.append(line)
        typer.echo(line)

    layout = _layout(args, nproc_per_node)
    where = f"logs: {ranks.logs}, losses in {last.name}"
    followed = [Follower(first, SAID, typer.echo), Follower(last, LOSSES, tell)]
    to_say = [f"{layout}; {where}"]  # once ranks are started: what is refused before says one line

    def look() -> None:
        while to_say:
            typer.echo(to_say.pop())
        for follower in followed:
            follower()

    start = time.monotonic()
    on_ranks.run(ranks, poll=look)
    look()
    typer.echo(f"{layout}: trained in {time.monotonic() - start:.0f} s")
    for line in _summary(args, losses):
        typer.echo(line)
    typer.echo(where)


def _layout(args: argparse.Namespace, world_size: int) -> str:
    """What the ranks are, in a few words."""
    tensor = args.tensor_model_parallel_size
    sizes = {"PP": args.pipeline_model_parallel_size, "CP": args.context_parallel_size}
    sizes["DP"] = world_size // (tensor * sizes["PP"] * sizes["CP"])
    sizes["EP"] = args.expert_model_parallel_size
    cut = f"helix {args.helix_m} x {args.helix_n}" if args.helix_m else f"TP={tensor}"
    more = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    return f"{', '.join([cut, *more])} on {world_size} ranks"


def _summary(args: argparse.Namespace, losses: list[str]) -> list[str]:
    """The first and the last line with a loss, and where the newest checkpoint is."""
    trained = [line for line in losses if not line.startswith("validation")]
    said = [f"first: {trained[0]}"] if trained else []
    said += [f"last:  {trained[-1]}"] if len(trained) > 1 else []
    newest = Path(args.save, "latest_checkpointed_iteration.txt") if args.save else None
    if newest and newest.exists():
        iteration = newest.read_text().strip()
        name = f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration
        said.append(f"checkpoint: {Path(args.save, name)}")
    return said

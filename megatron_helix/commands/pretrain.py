"""``helix pretrain``."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_helix.launching import fork_ranks


def pretrain(
    context: typer.Context,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Ranks to start.")],
    logs: Annotated[Path | None, typer.Option(help="Folder for the ranks' output.")] = None,
) -> None:
    """Train on this machine's CPU ranks: import Megatron once, then fork the ranks.

    Flags after -- are Megatron's and helix's, as for `torchrun -m megatron_helix.pretrain_gpt`.
    """
    from megatron_helix import pretrain_gpt

    pretrain_gpt.help_instead(context.args)
    flags = pretrain_gpt.prepare(["--helix-device", "cpu", *context.args], nproc_per_node)
    fork_ranks.run(
        fork_ranks.Ranks(
            target=pretrain_gpt.train, args=(flags,), world_size=nproc_per_node, logs=logs
        )
    )

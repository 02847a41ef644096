"""The torchrun command of one layout of an experiment, for a user who starts it on each node.

Pure: words from configs. Nothing is started here, and no GPU is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import vocabulary
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run, deployment, layout_flags, named
from megatron_helix.partition.layout import require_divides

ENTRY = "megatron_helix.pretrain_gpt"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines a run spans.

    Attributes:
        count: number of nodes; each runs as many ranks.
        rendezvous: ``HOST:PORT`` where they meet; needed when there are several.
    """

    count: int = 1
    rendezvous: str | None = None


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def command(
    experiment: ExperimentConfig,
    model: str,
    layout: str,
    *,
    nodes: Nodes = Nodes(),
    data: str | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The words of the command, the same on every node.

    Args:
        experiment: gives batch, number of ranks, steps, precision and device.
        model: name of one of its models.
        layout: name of one of its layouts.
        nodes: where it runs.
        data: prefix of a byte-level dataset; without one, Megatron's mock data.
        more: further flags for Megatron, which win over those before them.

    Raises:
        UserError: for names the experiment does not have, a layout that cannot run, and nodes that
            cannot hold its ranks.
    """
    run = Run(
        model=_named("MODEL", model, experiment.models),
        layout=_named("LAYOUT", layout, experiment.layouts),
        phase="train",
        precision=experiment.precision,
    )
    with named(run):
        deployment(experiment, run).check()
    require_divides("--nnodes", nodes.count, "the experiment's world_size", experiment.world_size)
    return [
        *("torchrun", *_rendezvous(nodes)),
        *("--nproc-per-node", str(experiment.world_size // nodes.count)),
        *("-m", ENTRY),
        *vocabulary.of_bytes(layout_flags(experiment, run), more),
        *(("--data-path", data, "--split", "100,0,0") if data else ("--mock-data",)),
        *more,
    ]


def flags(words: Sequence[str]) -> list[str]:
    """The flags of a rank, of the words of :func:`command`."""
    return list(words[words.index(ENTRY) + 1 :])


def _rendezvous(nodes: Nodes) -> list[str]:
    if nodes.count == 1:
        return ["--standalone"]
    if not nodes.rendezvous:
        raise UserError(
            f"--rdzv-endpoint: must be HOST:PORT of one node when --nnodes is {nodes.count}, got"
            " none; give the same one on every node"
        )
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", nodes.rendezvous)
    return ["--nnodes", str(nodes.count), "--rdzv-id", "helix", *endpoint]


def _named[Item: _Named](argument: str, name: str, items: Sequence[Item]) -> Item:
    found = {item.name: item for item in items}
    if name not in found:
        raise UserError(f"{argument}: must be one of {', '.join(found)}, got {name!r}")
    return found[name]

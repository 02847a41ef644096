"""The book that collectives of a step are entered in: axes, counting rule, group sizes."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from megatron_helix.machine.hardware import Beside
from megatron_helix.planner.deployment import Deployment

AXES = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "head": "HELIX_HEAD_GROUP",
    "dim": "HELIX_DIM_GROUP",
    "dp": "DATA_PARALLEL_GROUP_WITH_CP",
    "dp_gtp": "DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "gtp": "GTP_WEIGHT_REMAT_GROUP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "etp": "EXPERT_TENSOR_PARALLEL_GROUP",
    "etp_ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "expert_dp": "EXPERT_DATA_PARALLEL_GROUP",
    "expert_model": "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP",
    "model": "MODEL_PARALLEL_GROUP",
    "embedding": "EMBEDDING_GROUP",
    "optimizer": "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
    "world": "default_pg",
}
FP32 = INT32 = 4
INT64 = 8


class Transfer(NamedTuple):
    """Calls of one collective in one step, all alike.

    Attributes:
        what: what moves, for a reader.
        axis: short name, a key of :data:`AXES`.
        kind: as the ledger names it.
        when: ``forward``, ``backward`` (both a sum over micro-batches) or ``step``.
        ranks: size of the group.
        stride: distance of its neighbours in global ranks.
        calls: in a step.
        sent_bytes: by one rank in a step.
        beside: what moves beside computation; None if the next operation waits for it.
    """

    what: str
    axis: str
    kind: str
    when: str
    ranks: int
    stride: int
    calls: int
    sent_bytes: float
    beside: Beside | None = None


def share(kind: str, ranks: int) -> float:
    """What a rank sends of a tensor, by the ledger's rule."""
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if kind == "all_to_all":
        return (ranks - 1) / ranks
    if kind in ("all_gather", "reduce_scatter", "scatter"):
        return ranks - 1
    return 1 if ranks > 1 else 0  # send; broadcast on its source


@dataclass
class Book:
    """The collectives that one rank of a deployment takes part in, in one step."""

    here: Deployment
    entries: list[Transfer] = field(default_factory=list)

    @cached_property
    def groups(self) -> dict[str, tuple[int, int]]:
        """(ranks, stride) of every axis."""
        here, layout = self.here, self.here.layout
        beyond = here.tp * layout.cp
        stage = here.world_size // layout.pp
        return {
            "tp": (here.tp, 1),
            "head": (here.cut.n, here.cut.m),
            "dim": (here.cut.m, 1),
            "cp": (layout.cp, here.tp),
            "gtp": (layout.gtp, beyond),
            "dp": (here.replicas, here.tp * layout.gtp),
            "dp_gtp": (here.replicas * layout.gtp, here.tp),
            "pp": (layout.pp, stage),
            "embedding": (2, (layout.pp - 1) * stage),
            "model": (here.tp * layout.gtp * layout.pp, 1),
            "etp": (layout.etp, 1),
            "ep": (layout.ep, layout.etp),
            "etp_ep": (layout.etp * layout.ep, 1),
            "expert_dp": (here.expert_replicas, layout.etp * layout.ep),
            "expert_model": (layout.etp * layout.ep * layout.pp, 1),
            "optimizer": (here.world_size, 1),
            "world": (here.world_size, 1),
        }

    def sent(
        self,
        what: str,
        axis: str,
        kind: str,
        when: str,
        sent: float,
        calls: int,
        beside: Beside | None = None,
    ) -> None:
        """``sent`` bytes by a rank in all calls."""
        ranks, stride = self.groups[axis]
        if ranks > 1 and when in self.phases:
            entry = Transfer(
                what=what,
                axis=axis,
                kind=kind,
                when=when,
                ranks=ranks,
                stride=stride,
                calls=calls,
                sent_bytes=sent,
                beside=beside,
            )
            self.entries.append(entry)

    def call(
        self,
        what: str,
        axis: str,
        kind: str,
        when: str,
        elements: float,
        calls: int = 1,
        size: int | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Calls on a tensor of ``elements``; for every micro-batch unless ``when`` is ``step``."""
        size = self.here.element_bytes if size is None else size
        calls *= 1 if when == "step" else self.here.microbatches
        one = round(elements * size * share(kind, self.groups[axis][0]))
        self.sent(what, axis, kind, when, one * calls, calls, beside)

    @property
    def phases(self) -> tuple[str, ...]:
        """The parts that a step of the deployment has."""
        return ("forward", "backward", "step") if self.here.phase == "train" else ("forward",)

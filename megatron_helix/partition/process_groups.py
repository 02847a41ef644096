"""The head-axis and dim groups of every tensor-parallel group, as live process groups.

They are carved from the tensor-parallel groups that megatron-core has made, whatever pipeline,
data, context and expert parallelism stands beside them, and are registered where Megatron keeps its
own: in ``parallel_state`` (module attribute ``_HELIX_GROUPS``) and, per model, on the
``ProcessGroupCollection`` that its modules receive (attribute ``helix``).
"""

import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.basics.errors import UserError
from megatron_helix.partition.layout import HelixLayout


@dataclass(frozen=True, kw_only=True)
class HelixGroups:
    """A rank's three views of its tensor-parallel group.

    Attributes:
        tp: the whole tensor-parallel group, m * n ranks.
        dim: the m ranks that own the same heads, in segment order: a dim group.
        home: the same ranks, for gradients on their way home, and keys and values that are gathered
            beside core attention: over NCCL a communicator of its own, so that they and gathers of
            weights need not wait for each other.
        head: the n ranks that own the same segment, in the order of head groups: a head-axis group.
    """

    tp: dist.ProcessGroup
    dim: dist.ProcessGroup
    home: dist.ProcessGroup
    head: dist.ProcessGroup

    @property
    def segment(self) -> int:
        """Segment j of the head dimension that this rank owns."""
        return self.dim.rank()

    @property
    def head_group(self) -> int:
        """Head group i that this rank owns."""
        return self.head.rank()


def carve(layout: HelixLayout, tp_group: dist.ProcessGroup) -> HelixGroups:
    """Make this rank's dim and head-axis group inside ``tp_group``; all its ranks must call this.

    Only the members of a group take part in making it, so ranks need not know the other
    tensor-parallel groups. All dim groups are disjoint, as are all head-axis groups, and every
    rank makes its dim group first: no two ranks wait for each other in different order. They give
    up waiting when ``tp_group`` does.

    Raises:
        UserError: when ``tp_group`` does not have m * n ranks.
    """
    if tp_group.size() != layout.size:
        raise UserError(
            f"tensor-parallel group: must have --helix-m x --helix-n = {layout.m} x {layout.n} ="
            f" {layout.size} ranks, got {tp_group.size()}; set --tensor-model-parallel-size to"
            " their product or leave it away"
        )
    global_ranks = dist.get_process_group_ranks(tp_group)
    timeout = _timeout(tp_group)

    def group(ranks: list[int], name: str, options: Any = None) -> dist.ProcessGroup:
        return parallel_state.create_group(
            [global_ranks[rank] for rank in ranks],
            timeout=timeout,
            pg_options=options,
            use_local_synchronization=True,
            group_desc=name,
        )

    # Weights are gathered beside a GEMM that can start at the same moment; the gather should get
    # its few SMs first, or it waits for the GEMM to end.
    urgent = {"HELIX_DIM_GROUP": {"is_high_priority_stream": True}}
    on_nccl = dist.get_backend(tp_group) == "nccl"
    options = parallel_state.get_nccl_options("HELIX_DIM_GROUP", urgent) if on_nccl else None
    if options:
        options._timeout = timeout  # torch warns of two that differ

    dim = group(layout.dim_group(tp_group.rank()), "HELIX_DIM_GROUP", options)
    return HelixGroups(
        tp=tp_group,
        dim=dim,
        home=group(layout.dim_group(tp_group.rank()), "HELIX_DIM_GROUP", options)
        if on_nccl
        else dim,
        head=group(layout.head_axis_group(tp_group.rank()), "HELIX_HEAD_GROUP"),
    )


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """After which a collective of ``group`` gives up: --distributed-timeout-minutes, as made."""
    backend: Any = group._get_backend(group._device_types[0])
    return backend.options._timeout


def register(layout: HelixLayout, tp_group: dist.ProcessGroup) -> HelixGroups:
    """The helix groups of ``tp_group``, made on the first call and kept in ``parallel_state``."""
    groups = getattr(parallel_state, "_HELIX_GROUPS", None)
    if groups is None or groups.tp is not tp_group:
        groups = carve(layout, tp_group)
        parallel_state._HELIX_GROUPS = groups
    return groups


def on_head_axis(collection: ProcessGroupCollection, groups: HelixGroups) -> ProcessGroupCollection:
    """``collection`` as attention sees it: ``tp`` is the head-axis group, ``helix`` has all.

    Attention's head arithmetic and core attention divide heads by the size of ``tp``; they must see
    the n ranks of a head axis, never the m * n ranks of the tensor-parallel group.
    """
    seen = copy.copy(collection)
    seen.tp = groups.head
    seen.helix = groups
    return seen

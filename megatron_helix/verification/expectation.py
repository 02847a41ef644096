"""What a layout asks for, before anything runs: who holds which tile on which device, sends what.

The deployment verification holds it against what the ranks found themselves to be.
"""

from dataclasses import replace
from typing import Any

from megatron_helix.experiment import decode, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.runs import Run
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.traffic import AXES, step_bytes, transfers


def deployment(experiment: ExperimentConfig, run: Run) -> Deployment:
    """The run as the planner sees it."""
    if run.phase == "decode":
        return decode.deployment(experiment, run)
    return runs.deployment(experiment, run)


def describe(experiment: ExperimentConfig, run: Run) -> dict[str, Any]:
    """Place of every rank, and the bytes it is predicted to send in a step.

    Ranks run tensor-parallel first, then context, data and pipeline parallel, Megatron's order.
    """
    T, cp, pp = run.layout.tensor_parallel_size, run.layout.cp, run.layout.pp
    per_stage = experiment.world_size // pp
    ranks = []
    for rank in range(experiment.world_size):
        place: dict[str, Any] = {
            "rank": rank,
            "stage": rank // per_stage,
            "replica": rank % per_stage // (T * cp),
            "context": rank // T % cp,
            "tensor_rank": rank % T,
            "groups": _groups(run, rank, per_stage, experiment.world_size),
        }
        if run.layout.m and run.layout.n:
            place["head_group"], place["segment"] = divmod(rank % T, run.layout.m)
            place["groups"] |= _helix_groups(rank, T, run.layout.m)
        sent = predicted_bytes(experiment, run, rank)
        place["predicted_bytes"] = {"/".join(key): value for key, value in sent.items()}
        ranks.append(place)
    return {"tensor_parallel": T, "m": run.layout.m, "n": run.layout.n, "ranks": ranks}


def predicted_bytes(experiment: ExperimentConfig, run: Run, rank: int) -> dict[Any, float]:
    """What the planner says a rank sends in one step, by (axis, kind) as the ledger names them."""
    if run.phase == "decode":
        return decode.predicted_bytes(experiment, run, rank)
    here = deployment(experiment, run)
    if run.phase == "train":
        return step_bytes(here, rank)
    stage = rank // (experiment.world_size // run.layout.pp)
    alone = replace(here, layout=runs.settled(experiment, run), phase="forward").check()
    losses = [moved for moved in transfers(here, stage, rank) if moved.what.startswith("loss")]
    sums: dict[Any, float] = {}
    for moved in transfers(alone, stage, rank) + [one for one in losses if one.axis == "dp"]:
        if moved.sent_bytes:
            key = AXES[moved.axis], moved.kind
            sums[key] = sums.get(key, 0.0) + moved.sent_bytes
    return sums


def _groups(run: Run, rank: int, per_stage: int, world_size: int) -> dict[str, list[int]]:
    T, ep, etp = run.layout.tensor_parallel_size, run.layout.ep, run.layout.etp
    first = rank - rank % T
    groups = {
        "tp": list(range(first, first + T)),
        "pp": list(range(rank % per_stage, world_size, per_stage)),
    }
    if run.model.num_experts:
        first = rank - rank % (ep * etp) + rank % etp
        groups["ep"] = [first + expert * etp for expert in range(ep)]
    return groups


def _helix_groups(rank: int, T: int, m: int) -> dict[str, list[int]]:
    first, (head_group, segment) = rank - rank % T, divmod(rank % T, m)
    return {
        "dim": [first + head_group * m + j for j in range(m)],
        "head": [first + i * m + segment for i in range(T // m)],
    }


def devices(experiment: ExperimentConfig, cut: dict[str, Any]) -> list[dict[str, Any]]:
    """The device of every rank: a slot of a node, neighbours in rank on neighbouring slots."""
    per_node = experiment.world_size // experiment.launcher.nodes
    return [
        {
            "rank": place["rank"],
            "node": place["rank"] // per_node,
            "slot": place["rank"] % per_node,
            "kind": experiment.device,
        }
        for place in cut["ranks"]
    ]

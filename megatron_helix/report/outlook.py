"""What the planner says of an experiment's layouts, for models and machines that are not here.

A CPU can show that layouts agree and what they send; what a user asks next is how fast they would
be on GPUs. The answer is a prediction, and says so; figures that others claim stand beside it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig, OutlookConfig
from megatron_helix.experiment.results import change, significant
from megatron_helix.experiment.runs import compared
from megatron_helix.planner import core_attention
from megatron_helix.planner.time import predict
from megatron_helix.verification import expectation

Row = dict[str, Any]


def rows(experiment: ExperimentConfig) -> list[Row]:
    """Every machine, model, phase and layout that the experiment shares with its outlook.

    Returns:
        A mapping each: ``hardware``, ``model``, ``phase``, ``layout``, its ``micro_batch`` and the
        ``core_attention`` that is counted; ``tokens_per_s``, ``tpot_ms`` and ``memory_bytes`` (of
        the fullest rank), predicted;
        ``claimed`` (``tokens_per_s``, ``tpot_ms`` and ``of``; or None), and ``source``, which is
        "predicted". None of them where there is no outlook.
    """
    outlook = experiment.outlook
    if outlook is None:
        return []
    other, shared = outlook.experiment, {layout.name for layout in experiment.layouts}
    claims = {(claim.model, claim.layout, claim.phase): claim for claim in other.claims}
    found = []
    for machine in outlook.hardware:
        for run in compared(other):
            if run.layout.name not in shared or run.phase == "decode":
                continue
            whole = machine.scaled(other.world_size)
            planned = expectation.deployment(other, run)
            # Of the model as it is: what is trained here reads bytes.
            own = {"phase": run.phase, "machine": whole, "padded_vocabulary": None}
            here = replace(planned, **own).check()
            figures = predict(here, whole)
            fused = whole.fused_attention_max_channels
            claim = claims.get((run.model.name, run.layout.name, run.phase))
            found.append(
                {
                    "hardware": machine.name,
                    "model": run.model.name,
                    "phase": run.phase,
                    "layout": run.layout.name,
                    "micro_batch": here.layout.micro_batch,
                    "core_attention": core_attention.planned(here, fused_channels=fused),
                    "tokens_per_s": figures.tokens_per_s,
                    "tpot_ms": figures.tpot_ms,
                    "memory_bytes": figures.memory.total,
                    "claimed": claim
                    and claim.model_dump(include={"tokens_per_s", "tpot_ms", "of"}),
                    "source": "predicted",
                }
            )
    return found


def claimed(found: Sequence[Row]) -> list[Row]:
    """The rows of models and phases that somebody claims something of; all if of none."""
    cases = {(row["model"], row["phase"]) for row in found if row["claimed"]}
    return [row for row in found if (row["model"], row["phase"]) in cases] or list(found)


def note(outlook: OutlookConfig) -> str:
    """What is predicted, and what stands beside it."""
    other = outlook.experiment
    of = sorted({claim.of for claim in other.claims})
    return (
        f"{other.precision}, {other.batch.sequences:,} sequences of"
        f" {other.batch.sequence_length:,} tokens; nothing here was measured."
        + (f" Claimed: by {'; '.join(of)}." if of else "")
        + " In brackets: against the first layout. mb: sequences of a micro-batch, then the core"
        " attention, as the experiment's file asks; docs/performance.md has every layout at its"
        " best micro-batch, with the layer spec's core attention. The planner's model of a GPU, and"
        " how far it was off where it was measured: docs/planner.md, docs/performance.md."
    )


def how(row: Row) -> str:
    """With which micro-batch and core attention: other figures of a layout have others."""
    return f"mb{row['micro_batch']} {row['core_attention']}"


def first(row: Row, found: Sequence[Row]) -> Row:
    """The first layout of the same machine, model and phase."""
    keys = ("hardware", "model", "phase")
    return next(one for one in found if all(one[key] == row[key] for key in keys))


def cells(row: Row, found: Sequence[Row], *, narrow: bool = False) -> list[str]:
    """TPS and TPOT, each predicted and claimed, and the memory of the fullest rank in GB.

    ``narrow`` has whole per cents, and none beside a claim.
    """
    digits = 0 if narrow else 1
    base = first(row, found)
    made = []
    for key in ("tokens_per_s", "tpot_ms"):
        made.append(f"{significant(row[key])}{change(row[key], base[key], digits)}")
        mine, other = ((one["claimed"] or {}).get(key) for one in (row, base))
        beside = "" if narrow else change(mine or 0, other or 0, digits)
        made.append(f"{mine:,.12g}{beside}" if mine else "-")
    return [*made, f"{row['memory_bytes'] / 1e9:.0f}"]

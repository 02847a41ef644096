"""The deployment verification: four checks of every run, each with the figures it rests on.

1. **mapping**: the partitions lie one to one on the devices;
2. **fp16**: training in fp16 stays near training in fp32;
3. **communication**: the ledger's bytes are the predicted ones, its time is the profiler's;
4. **load**: parameters, KV bytes, FLOPs and busy time are alike on all ranks.

What is checked comes from live ranks (:mod:`megatron_helix.recording.placement`), the expectation
from :mod:`megatron_helix.verification.expectation` and from the checkpoint all layouts start from.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_helix.basics import files
from megatron_helix.experiment import decode, execution, routed, runs
from megatron_helix.experiment.config import ExperimentConfig, Fp16Config, VerificationConfig
from megatron_helix.experiment.runs import Run
from megatron_helix.verification.tiles import fingerprints

Check = dict[str, Any]
_LISTED = 4  # problems that are spelled out
_MEASURABLE_S = 1e-3  # by which ledger and profiler may differ of a rank whatever it sends


def verify(
    experiment: ExperimentConfig,
    compared: Sequence[Run],
    checks: Sequence[Run],
    out: Path,
    values: dict[str, Any],
) -> list[Check]:
    """Every check of every run.

    Args:
        experiment: what was run.
        compared: the runs that are compared.
        checks: those beside them, for fp16.
        out: folder of the experiment.
        values: of the graph's nodes.

    Returns:
        Mappings with ``check``, ``run``, ``passed`` (None where nothing is demanded), ``detail``.
    """
    asked = experiment.verification
    found = []
    for run in compared:
        result = values[f"execution_monitoring/{run.name}"]
        cut = values[f"partitioning_setup/{run.name}"]
        if run.phase == "decode":
            found += decode.verify(run, cut, result, asked)
            continue
        live = placements(runs.folder(out, run) / "metrics")
        wanted = fingerprints(experiment, run, runs.initial_folder(out, run.model), live)
        found += [
            mapping(run.name, cut, values[f"device_mapping/{run.name}"], live, wanted),
            sent_bytes(run.name, cut, result["per_rank"]),
            times(run.name, result["per_rank"], asked.time_factor),
            load(run, live, result["per_rank"], asked, execution.step_flops(experiment, run)),
        ]
    if asked.fp16:
        trained = {
            (run.model.name, run.layout.name, run.precision): values[
                f"execution_monitoring/{run.name}"
            ]
            for run in [*compared, *checks]
            if run.phase == "train"
        }
        for model in experiment.models:
            for layout in experiment.layouts:
                if not layout.trains_in("fp16"):
                    found.append(_no_fp16(f"{model.name}-{layout.name}"))
                    continue
                single, half = (trained[model.name, layout.name, p] for p in ("fp32", "fp16"))
                found.append(fp16(f"{model.name}-{layout.name}", single, half, asked.fp16))
    return sorted(found, key=lambda check: check["check"])


def placements(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a run said they are."""
    remedy = "remove the folder of that run, and call `helix run` once more"
    return [files.read_json(file, remedy) for file in files.of_ranks(folder, ".json")]


def mapping(
    run: str,
    cut: dict[str, Any],
    devices: Sequence[dict[str, Any]],
    live: Sequence[dict[str, Any]],
    wanted: dict[tuple[int, int, str, str], str],
) -> Check:
    """The partitions lie one to one on the devices.

    Args:
        run: name of the run.
        cut: place of every rank in the layout.
        devices: the device each rank should be on.
        live: what the ranks found.
        wanted: fingerprint of every tile by (tensor rank, layer, weight, dtype).
    """
    problems = []
    if len(live) != len(cut["ranks"]):
        problems.append(f"{len(cut['ranks'])} ranks asked for, {len(live)} ran")
    used = {(rank["device"]["host"], rank["device"]["id"]) for rank in live}
    if len(used) != len(live):
        problems.append(f"{len(live)} ranks on {len(used)} devices")
    tiles = 0
    for place, device, rank in zip(cut["ranks"], devices, live, strict=False):
        name = f"rank {place['rank']}"
        if (rank["device"]["slot"], rank["device"]["kind"]) != (device["slot"], device["kind"]):
            problems.append(
                f"{name} should be on {device['kind']} {device['slot']} and is on"
                f" {rank['device']['kind']} {rank['device']['slot']}"
            )
        for axis, members in place["groups"].items():
            if rank["groups"].get(axis) != members:
                problems.append(
                    f"{name}: its {axis} group should be {members} and is"
                    f" {rank['groups'].get(axis)}"
                )
        for weight in rank["attention"]:
            tiles += 1
            dtype = weight["dtype"]
            tile = (place["tensor_rank"], weight["layer"], weight["weight"], dtype)
            if wanted.get(tile) != weight["sha256"]:
                holder = [
                    key[0]
                    for key, value in wanted.items()
                    if key[1:] == tile[1:] and value == weight["sha256"]
                ]
                what = f"tile {holder[0]}" if holder else "no tile of the model"
                problems.append(
                    f"{name}: {weight['weight']} of layer {weight['layer']} should be tile"
                    f" {tile[0]} and is {what}"
                )
    detail = (
        f"{len(live)} ranks on {len(used)} devices, {tiles} attention weight tiles, each the part"
        " of the checkpoint that the layout says"
    )
    return _check("mapping", run, problems, detail)


def fp16(run: str, single: dict[str, Any], half: dict[str, Any], asked: Fp16Config) -> Check:
    """Training in fp16 stays near training in fp32: finite, within the band, no lost steps."""
    problems = []
    if not all(math.isfinite(loss) for loss in half["losses"]):
        problems.append(f"losses must be finite, got {half['losses']}")
    if not all(math.isfinite(norm) for norm in half["grad_norms"]):
        problems.append(f"gradient norms must be finite, got {half['grad_norms']}")
    if half["skipped_steps"]:
        problems.append(f"{half['skipped_steps']} updates overflowed and were skipped")
    pairs = zip(half["losses"], single["losses"], strict=False)  # one may have had fewer steps
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    if not apart <= asked.band:
        problems.append(f"loss leaves fp32's by {apart:.1e}, allowed {asked.band:.1e}")
    scales = half["loss_scales"]
    detail = (
        f"loss within {apart:.1e} of fp32's at every step (band {asked.band:.1e}), no NaN or Inf,"
        f" loss scale {_history(scales)}, {half['skipped_steps']} skipped"
    )
    return _check("fp16", run, problems, detail, loss_scales=scales, difference=apart)


def _no_fp16(run: str) -> Check:
    """Nothing is demanded of a layout that Megatron does not train in fp16."""
    said = "Megatron trains torch FSDP2 in fp32 and bf16 only; no demand on such a baseline"
    return _check("fp16", run, [], said) | {"passed": None}


def _history(scales: Sequence[float]) -> str:
    """Equal loss scales of successive steps together."""
    pieces = [(scale, len([*steps])) for scale, steps in itertools.groupby(scales)]
    return ", then ".join(f"{scale:,.0f} for {steps} steps" for scale, steps in pieces)


def sent_bytes(run: str, cut: dict[str, Any], per_rank: Sequence[dict[str, Any]]) -> Check:
    """The ledger's bytes are the predicted ones, for every rank, axis and kind.

    Which rank a token's way back from its expert starts at, and whether there is any way to go, is
    the router's choice: what goes to experts and back is compared as a sum over the ranks that
    share the experts, as it were at even loads, up to the rounding of each call to whole bytes.
    """
    problems, total, entries = [], 0.0, 0
    for place, rank in zip(cut["ranks"], per_rank, strict=True):
        for key in sorted({*place["predicted_bytes"], *rank["sent_bytes"]}):
            who, members = f"rank {place['rank']}", [place["rank"]]
            if key == routed.KEY and "ep" in place["groups"]:
                members = place["groups"]["ep"]
                who = f"ranks {members}"
                if place["rank"] != members[0]:
                    continue
            want = sum(cut["ranks"][i]["predicted_bytes"].get(key, 0) for i in members)
            got = sum(per_rank[i]["sent_bytes"].get(key, 0) for i in members)
            total += got
            entries += bool(got)
            if len(members) > 1:
                kept = sum(per_rank[i]["kept_bytes"].get(key, 0) for i in members)
                got = routed.at_even_loads(got, kept, len(members))
            rounded = sum(per_rank[i]["calls"].get(key, 0) for i in members) / 2
            if abs(want - got) > (rounded if len(members) > 1 else 0):
                problems.append(f"{who}, {key}: {want:,.0f} bytes predicted, {got:,.0f} sent")
    detail = f"{total / 1e6:,.2f} MB of all ranks in a step, {entries} entries, all as predicted"
    return _check("communication: bytes", run, problems, detail)


def times(run: str, per_rank: Sequence[dict[str, Any]], factor: float) -> Check:
    """The ledger's time of the collectives is the profiler's, within a factor, over all ranks.

    On a GPU that is the time in which nothing else ran: what computation hides is in neither.
    Nothing is demanded of a rank alone: it sends nothing, so both measure overheads. Of one among
    others the factor's square is allowed, for its share of the waiting is as may be, and any
    difference below a millisecond.
    """
    profiles = [rank["profile"] for rank in per_rank if rank["profile"]]
    ledger, profiler, hidden = (
        sum(profile[key] for profile in profiles) / len(per_rank)
        for key in ("ledger_s", "exposed_s", "hidden_s")
    )
    ratio = ledger / profiler if profiler else math.inf
    said = (
        f"{ledger:.3f} s a rank by the ledger, {profiler:.3f} s by the profiler in the same step"
        + (f" and {hidden:.3f} s hidden behind computation" if hidden else "")
        + f", ratio {ratio:.2f} (band 1/{factor:g} to {factor:g})"
    )
    problems = [] if 1 / factor <= ratio <= factor else [said]
    wide = factor**2
    problems += [
        f"rank {rank}: {own:.3f} s by the ledger, {other:.3f} s by the profiler"
        f" (band of one rank 1/{wide:g} to {wide:g})"
        for rank, profile in enumerate(one["profile"] for one in per_rank)
        if profile
        for own, other in [(profile["ledger_s"], profile["exposed_s"])]
        if abs(own - other) > _MEASURABLE_S and not other / wide <= own <= other * wide
    ]
    found = _check("communication: time", run, problems, said, ratio=ratio)
    if len(per_rank) == 1:
        found |= {"passed": None, "detail": said + "; no demand on a rank alone"}
    return found


def load(
    run: Run,
    live: Sequence[dict[str, Any]],
    per_rank: Sequence[dict[str, Any]],
    asked: VerificationConfig,
    flops: float,
) -> Check:
    """Largest over mean of what a rank holds and does. Limits hold for helix layouts.

    ``flops`` are those of the first step by the formula; the detail says which part was counted,
    on CPUs. On a GPU none are, and busy is the GPU itself: a process that is late with its kernels
    would else look as if it had more to compute.
    """
    loads = {
        "parameters": [parameters(rank) for rank in live],
        "KV bytes": [rank["key_value_bytes"] for rank in live],
        "FLOPs": [rank["flops"] for rank in per_rank],
        "busy time": [_busy_s(rank) for rank in per_rank],
    }
    limits = {
        "parameters": asked.balance,
        "KV bytes": asked.balance,
        "FLOPs": asked.routing_balance if run.model.num_experts else asked.balance,
        "busy time": asked.busy_balance,
    }
    ratios, said, problems = {}, [], []
    for what, values in loads.items():
        if not any(values):
            said.append(f"{what} not counted")
            continue
        known = [value or 0 for value in values]
        ratio = ratios[what] = max(known) * len(known) / sum(known)
        said.append(f"{what} {ratio:.3f} (limit {limits[what]:g})")
        if what == "FLOPs":
            said[-1] += f", {sum(known) / flops:.0%} of the formula's counted"
        if ratio > limits[what]:
            problems.append(f"{what}: max/mean {ratio:.3f}, allowed {limits[what]:g}")
    detail = "max/mean over ranks: " + ", ".join(said)
    found = _check("load", run.name, problems, detail, loads=loads, ratios=ratios)
    if not run.layout.is_helix:
        found |= {"passed": None, "detail": detail + "; no demand on a baseline"}
    return found


def _busy_s(rank: dict[str, Any]) -> float:
    return (rank["profile"] or {}).get("computed_s", rank["busy_s"])


def parameters(rank: dict[str, Any]) -> int:
    """Parameters a rank holds."""
    return sum(math.prod(shape) for shape, _ in rank["parameters"].values())


def _check(check: str, run: str, problems: list[str], detail: str, **figures: Any) -> Check:
    if problems:
        more = len(problems) - _LISTED
        listed = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        detail = "; ".join(listed)
    return {"check": check, "run": run, "passed": not problems, "detail": detail, **figures}

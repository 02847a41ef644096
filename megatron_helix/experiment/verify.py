"""The deployment verification: four checks of every run, each with the figures it rests on.

1. **mapping**: the partitions lie one to one on the devices;
2. **fp16**: training in fp16 stays near training in fp32;
3. **communication**: the ledger's bytes are the predicted ones, its time is the profiler's;
4. **load**: parameters, KV bytes, FLOPs and busy time are alike on all ranks.

What is checked comes from live ranks (:mod:`megatron_helix.recording.placement`), the expectation
from :mod:`megatron_helix.experiment.partition` and from the checkpoint all layouts start from.
"""

import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_helix.experiment import decode, runs
from megatron_helix.experiment.config import ExperimentConfig, Fp16Config, VerificationConfig
from megatron_helix.experiment.runs import Run

Check = dict[str, Any]
_LISTED = 4  # problems that are spelled out
_ROUTED = "EXPERT_MODEL_PARALLEL_GROUP/all_to_all"


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
            load(run, live, result["per_rank"], asked),
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
                single, half = (trained[model.name, layout.name, p] for p in ("fp32", "fp16"))
                found.append(fp16(f"{model.name}-{layout.name}", single, half, asked.fp16))
    return sorted(found, key=lambda check: check["check"])


def placements(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a run said they are."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


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


def fingerprints(
    experiment: ExperimentConfig, run: Run, checkpoint: Path, live: Sequence[dict[str, Any]]
) -> dict[tuple[int, int, str, str], str]:
    """SHA-256 of every tile of the checkpoint's attention weights.

    Returns:
        By (tensor rank, layer, weight, dtype), for the dtypes that ranks hold.
    """
    import torch

    from megatron_helix.experiment.partition import deployment
    from megatron_helix.recording.placement import ATTENTION_WEIGHTS, sha256

    T = run.layout.tensor_parallel_size
    cut = deployment(experiment, run).cut if run.layout.is_helix else None
    dtypes = {weight["dtype"] for rank in live for weight in rank["attention"]}
    found = {}
    for name, axis in zip(ATTENTION_WEIGHTS, (0, 1), strict=True):
        whole = _read(checkpoint, f"decoder.layers.self_attention.{name}.weight")
        order = torch.arange(whole.size(1 + axis))
        if cut:
            order = cut.qkv_rows() if axis == 0 else cut.proj_columns()
        for layer, weight in enumerate(whole):
            for rank, part in enumerate(order.view(T, -1)):
                tile = weight.index_select(axis, part)
                for dtype in dtypes:
                    found[rank, layer, name, dtype] = sha256(tile.to(getattr(torch, dtype)))
    return found


@cache
def _read(checkpoint: Path, name: str) -> Any:
    """One tensor of Megatron's distributed checkpoint, ``[layers, ...]``."""
    import torch
    from torch.distributed.checkpoint import filesystem, state_dict_loader

    step = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    folder = checkpoint / f"iter_{step:07d}"
    stored: Any = filesystem.FileSystemReader(folder).read_metadata().state_dict_metadata[name]
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load({name: tensor}, checkpoint_id=folder, no_dist=True)
    return tensor


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
        f" loss scale {scales[0]:,.0f} to {scales[-1]:,.0f}, {half['skipped_steps']} skipped"
    )
    return _check("fp16", run, problems, detail, loss_scales=scales, difference=apart)


def sent_bytes(run: str, cut: dict[str, Any], per_rank: Sequence[dict[str, Any]]) -> Check:
    """The ledger's bytes are the predicted ones, for every rank, axis and kind.

    Which rank a token's way back from its expert starts at is the router's choice: what goes to
    experts and back is compared as a sum over the ranks that share the experts, up to the rounding
    of each call to whole bytes.
    """
    problems, total, entries = [], 0.0, 0
    for place, rank in zip(cut["ranks"], per_rank, strict=True):
        for key in sorted({*place["predicted_bytes"], *rank["sent_bytes"]}):
            who, members = f"rank {place['rank']}", [place["rank"]]
            if key == _ROUTED and "ep" in place["groups"]:
                members = place["groups"]["ep"]
                who = f"ranks {members}"
                if place["rank"] != members[0]:
                    continue
            want = sum(cut["ranks"][i]["predicted_bytes"].get(key, 0) for i in members)
            got = sum(per_rank[i]["sent_bytes"].get(key, 0) for i in members)
            total += got
            entries += bool(got)
            rounded = sum(per_rank[i]["calls"].get(key, 0) for i in members) / 2
            if abs(want - got) > (rounded if len(members) > 1 else 0):
                problems.append(f"{who}, {key}: {want:,.0f} bytes predicted, {got:,.0f} sent")
    detail = f"{total / 1e6:,.2f} MB of all ranks in a step, {entries} entries, all as predicted"
    return _check("communication: bytes", run, problems, detail)


def times(run: str, per_rank: Sequence[dict[str, Any]], factor: float) -> Check:
    """The ledger's time of the collectives is the profiler's, within a factor, over all ranks.

    Nothing is demanded of a rank alone: it sends nothing, so both measure overheads.
    """
    profiles = [rank["profile"] for rank in per_rank if rank["profile"]]
    ledger = sum(profile["ledger_s"] for profile in profiles)
    profiler = sum(profile["profiler_s"] for profile in profiles)
    ratio = ledger / profiler if profiler else math.inf
    said = (
        f"{ledger / len(per_rank):.3f} s a rank by the ledger, {profiler / len(per_rank):.3f} s by"
        f" the profiler in the same step, ratio {ratio:.2f} (band 1/{factor:g} to {factor:g})"
    )
    problems = [] if 1 / factor <= ratio <= factor else [said]
    found = _check("communication: time", run, problems, said, ratio=ratio)
    if len(per_rank) == 1:
        found |= {"passed": None, "detail": said + "; no demand on a rank alone"}
    return found


def load(
    run: Run,
    live: Sequence[dict[str, Any]],
    per_rank: Sequence[dict[str, Any]],
    asked: VerificationConfig,
) -> Check:
    """Largest over mean of what a rank holds and does. Limits hold for helix layouts."""
    loads = {
        "parameters": [parameters(rank) for rank in live],
        "KV bytes": [rank["key_value_bytes"] for rank in live],
        "FLOPs": [rank["flops"] for rank in per_rank],
        "busy time": [rank["busy_s"] for rank in per_rank],
    }
    limits = {
        "parameters": asked.balance,
        "KV bytes": asked.balance,
        "FLOPs": asked.routing_balance if run.model.num_experts else asked.balance,
        "busy time": asked.busy_balance,
    }
    ratios = {
        what: max(values) * len(values) / sum(values)
        for what, values in loads.items()
        if all(values)
    }
    problems = [
        f"{what}: max/mean {ratio:.3f}, allowed {limits[what]:g}"
        for what, ratio in ratios.items()
        if ratio > limits[what]
    ]
    detail = "max/mean over ranks: " + ", ".join(
        f"{what} {ratio:.3f} (limit {limits[what]:g})" for what, ratio in ratios.items()
    )
    found = _check("load", run.name, problems, detail, loads=loads, ratios=ratios)
    if not run.layout.is_helix:
        found |= {"passed": None, "detail": detail + "; no demand on a baseline"}
    return found


def parameters(rank: dict[str, Any]) -> int:
    """Parameters a rank holds."""
    return sum(math.prod(shape) for shape, _ in rank["parameters"].values())


def _check(check: str, run: str, problems: list[str], detail: str, **figures: Any) -> Check:
    if problems:
        more = len(problems) - _LISTED
        listed = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        detail = "; ".join(listed)
    return {"check": check, "run": run, "passed": not problems, "detail": detail, **figures}

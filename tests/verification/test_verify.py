"""The deployment verification fails where it should: every check, spoilt."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_helix import pretrain_gpt
from megatron_helix.experiment import config, decode, execution, routed, runs
from megatron_helix.launching import fork_ranks
from megatron_helix.verification import tiles, verify
from tests.experiment_case import Values, experiment, of


def mapped(
    finished: tuple[Path, Values], spoil: Callable[[list[dict[str, Any]]], None]
) -> dict[str, Any]:
    """The mapping check of the helix run, after ``spoil`` has been at what the ranks said."""
    out, values = finished
    run = runs.compared(experiment())[1]
    live = verify.placements(runs.folder(out, run) / "metrics")
    wanted = tiles.fingerprints(experiment(), run, runs.initial_folder(out, run.model), live)
    spoil(live)
    cut, devices = of(values, "partitioning_setup"), of(values, "device_mapping")
    return verify.mapping(run.name, cut, devices, live, wanted)


def test_a_swapped_pair_of_ranks_fails(finished: tuple[Path, Values], tmp_path: Path) -> None:
    out, values = finished
    run = runs.compared(experiment())[1]
    flags = runs.run_flags(experiment(), run, out / "data" / "python_stdlib", out)
    ready = pretrain_gpt.prepare([*flags, "--helix-metrics", str(tmp_path)], 4)

    def swapped() -> None:
        rank = os.environ["RANK"]
        os.environ["RANK"] = {"1": "2", "2": "1"}.get(rank, rank)
        pretrain_gpt.train(ready)

    fork_ranks.run(
        fork_ranks.Ranks(target=swapped, world_size=4, logs=tmp_path / "logs"), timeout_s=60
    )
    live = verify.placements(tmp_path)
    wanted = tiles.fingerprints(experiment(), run, runs.initial_folder(out, run.model), live)
    cut, devices = of(values, "partitioning_setup"), of(values, "device_mapping")
    found = verify.mapping(run.name, cut, devices, live, wanted)
    assert found["passed"] is False
    assert "rank 1 should be on cpu 1 and is on cpu 2" in found["detail"]
    assert "rank 2 should be on cpu 2 and is on cpu 1" in found["detail"]


def test_tiles_that_lie_on_other_ranks_fail(finished: tuple[Path, Values]) -> None:
    def swap(live: list[dict[str, Any]]) -> None:
        live[1]["attention"], live[2]["attention"] = live[2]["attention"], live[1]["attention"]

    found = mapped(finished, swap)
    assert found["passed"] is False
    assert "rank 1: linear_qkv of layer 0 should be tile 1 and is tile 2" in found["detail"]


def test_a_tile_of_another_model_fails(finished: tuple[Path, Values]) -> None:
    found = mapped(finished, lambda live: live[3]["attention"][0].update(sha256="0"))
    assert "rank 3: linear_qkv of layer 0 should be tile 3 and is no tile" in found["detail"]


def test_two_ranks_on_one_device_fail(finished: tuple[Path, Values]) -> None:
    found = mapped(finished, lambda live: live[3].update(device=live[0]["device"]))
    assert found["passed"] is False
    assert "4 ranks on 3 devices" in found["detail"]


def test_a_wrong_process_group_fails(finished: tuple[Path, Values]) -> None:
    found = mapped(finished, lambda live: live[0]["groups"].update(dim=[0, 2]))
    assert "rank 0: its dim group should be [0, 1] and is [0, 2]" in found["detail"]


def test_a_missing_rank_fails(finished: tuple[Path, Values]) -> None:
    found = mapped(finished, lambda live: live.pop())
    assert "4 ranks asked for, 3 ran" in found["detail"]


def test_a_wrong_byte_formula_fails(finished: tuple[Path, Values]) -> None:
    _, values = finished
    cut, result = of(values, "partitioning_setup"), of(values, "execution_monitoring")
    key = "HELIX_DIM_GROUP/all_gather"
    cut["ranks"][2]["predicted_bytes"][key] += 4
    found = verify.sent_bytes("x", cut, result["per_rank"])
    assert found["passed"] is False
    assert f"rank 2, {key}:" in found["detail"]


def test_what_goes_to_experts_is_compared_with_what_a_rank_keeps() -> None:
    """Of 4 ranks that route 1024 bytes each, at even loads 768 are sent; the sum is what holds."""
    ranks = [{"rank": i, "predicted_bytes": {routed.KEY: 768}} for i in range(4)]
    cut = {"ranks": [{**rank, "groups": {"ep": [0, 1, 2, 3]}} for rank in ranks]}
    sent, kept = (1000, 24, 700, 1100), (24, 800, 200, 248)
    per_rank = [
        {"sent_bytes": {routed.KEY: a}, "kept_bytes": {routed.KEY: b}, "calls": {routed.KEY: 1}}
        for a, b in zip(sent, kept, strict=True)
    ]
    assert verify.sent_bytes("x", cut, per_rank)["passed"] is True
    per_rank[2]["kept_bytes"][routed.KEY] -= 16
    found = verify.sent_bytes("x", cut, per_rank)
    assert found["passed"] is False
    assert f"ranks [0, 1, 2, 3], {routed.KEY}: 3,072 bytes predicted, 3,060 sent" in found["detail"]

    serving = next(run for run in runs.compared(experiment()) if run.phase == "decode")
    mean = {"sent_bytes": {routed.KEY: 706.0}, "kept_bytes": {routed.KEY: 318.0}, "kv_bytes": [1]}
    said, _ = decode.verify(serving, cut, mean, experiment().verification)
    assert said["passed"] is True
    mean["sent_bytes"][routed.KEY] -= 1
    said, _ = decode.verify(serving, cut, mean, experiment().verification)
    assert said["passed"] is False


def test_traffic_that_nobody_predicted_fails(finished: tuple[Path, Values]) -> None:
    _, values = finished
    cut, result = of(values, "partitioning_setup"), of(values, "execution_monitoring")
    result["per_rank"][1]["sent_bytes"]["NEW_GROUP/all_reduce"] = 8
    found = verify.sent_bytes("x", cut, result["per_rank"])
    assert "rank 1, NEW_GROUP/all_reduce: 0 bytes predicted, 8 sent" in found["detail"]


@pytest.mark.parametrize(
    ("ledger_s", "passes"), [(1.9, True), (0.6, True), (2.1, False), (0.4, False)]
)
def test_the_ledgers_time_must_be_the_profilers(ledger_s: float, passes: bool) -> None:
    hidden = {"hidden_s": 7.0, "profiler_s": 8.0}  # by computation: in neither
    ranks = [{"profile": {"ledger_s": ledger_s, "exposed_s": 1.0, **hidden}}] * 2
    found = verify.times("x", ranks, 2.0)
    assert found["passed"] is passes
    assert "1.000 s by the profiler in the same step and 7.000 s hidden" in found["detail"]


def test_a_rank_that_times_nothing_is_found_among_others() -> None:
    """As all but the first did whose clock took the first GPU's stream for their own."""
    hidden = {"hidden_s": 0.0}
    sound = {"profile": {"ledger_s": 1.5, "exposed_s": 1.0, **hidden}}
    silent = {"profile": {"ledger_s": 0.1, "exposed_s": 0.5, **hidden}}
    assert verify.times("x", [sound] * 4, 2.0)["passed"] is True
    found = verify.times("x", [sound, sound, silent, sound], 2.0)
    assert found["passed"] is False
    said = "rank 2: 0.100 s by the ledger, 0.500 s by the profiler (band of one rank 1/4 to 4)"
    assert said in found["detail"]
    for own, other, passes in ((0.0, 0.0005, True), (12e-4, 2.5e-4, True), (14e-4, 2.5e-4, False)):
        brief = {"profile": {"ledger_s": own, "exposed_s": other, **hidden}}
        assert verify.times("x", [sound, brief], 2.0)["passed"] is passes


def test_a_run_without_a_profile_fails() -> None:
    assert verify.times("x", [{"profile": None}] * 2, 2.0)["passed"] is False


def test_a_rank_alone_has_no_time_to_compare() -> None:
    ranks = [{"profile": {"ledger_s": 0.1, "exposed_s": 0.0, "hidden_s": 0.0}}]
    assert verify.times("x", ranks, 2.0)["passed"] is None


@pytest.mark.parametrize("what", ["parameters", "KV bytes", "FLOPs", "busy time"])
def test_an_unbalanced_layout_fails(finished: tuple[Path, Values], what: str) -> None:
    out, values = finished
    run = runs.compared(experiment())[1]
    live = verify.placements(runs.folder(out, run) / "metrics")
    result = of(values, "execution_monitoring")
    asked, flops = experiment().verification, execution.step_flops(experiment(), run)
    sound = verify.load(run, live, result["per_rank"], asked, flops)
    assert sound["passed"] is True
    assert "100% of the formula's counted" in sound["detail"]
    live[0]["parameters"]["more"] = [[64, 4096 if what == "parameters" else 0], "float32"]
    live[0]["key_value_bytes"] *= 2 if what == "KV bytes" else 1
    result["per_rank"][0]["flops"] *= 2 if what == "FLOPs" else 1
    result["per_rank"][0]["busy_s"] *= 100 if what == "busy time" else 1
    found = verify.load(run, live, result["per_rank"], asked, flops)
    assert found["passed"] is False
    assert found["detail"].startswith(f"{what}: max/mean")


def test_a_gpu_is_busy_with_kernels_and_not_with_waiting_for_its_process(
    finished: tuple[Path, Values],
) -> None:
    out, values = finished
    run = runs.compared(experiment())[1]
    live = verify.placements(runs.folder(out, run) / "metrics")
    asked = experiment().verification

    def found(late_s: float, **computed: float) -> Any:
        ranks = of(values, "execution_monitoring")["per_rank"]
        for rank in ranks:
            rank["busy_s"], rank["profile"] = 0.03, {"computed_s": 0.02}
        ranks[0]["busy_s"] += late_s
        ranks[1]["profile"] |= computed
        return verify.load(run, live, ranks, asked, 1.0)

    assert found(late_s=0.1)["ratios"]["busy time"] == 1.0
    assert found(late_s=0.0, computed_s=0.2)["detail"].startswith("busy time: max/mean 3.07")


def test_flops_that_no_rank_or_only_some_have_counted(finished: tuple[Path, Values]) -> None:
    out, values = finished
    run = runs.compared(experiment())[1]
    live = verify.placements(runs.folder(out, run) / "metrics")
    ranks = of(values, "execution_monitoring")["per_rank"]
    asked = experiment().verification
    ranks[0]["flops"] = None
    assert verify.load(run, live, ranks, asked, 1.0)["detail"].startswith("FLOPs: max/mean 1.333")
    none = [{**rank, "flops": None} for rank in ranks]
    found = verify.load(run, live, none, asked, 1.0)
    assert found["passed"] is True
    assert "FLOPs not counted" in found["detail"]


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ({"losses": [5.0, float("nan")]}, "losses must be finite"),
        ({"losses": [5.0, 4.9]}, "loss leaves fp32's by 2.1e-02, allowed 2.0e-03"),
        ({"grad_norms": [1.0, float("inf")]}, "gradient norms must be finite"),
        ({"skipped_steps": 1}, "1 updates overflowed"),
    ],
)
def test_fp16_that_goes_astray_fails(half: dict[str, Any], said: str) -> None:
    single = {"losses": [5.0, 4.8]}
    sound = {"losses": [5.0, 4.8], "grad_norms": [1.0], "skipped_steps": 0, "loss_scales": [2.0]}
    asked = config.Fp16Config()
    passed = verify.fp16("x", single, {**sound, "loss_scales": [2.0, 2.0, 4.0]}, asked)
    assert passed["passed"] is True
    assert "loss scale 2 for 2 steps, then 4 for 1 steps" in passed["detail"]
    found = verify.fp16("x", single, {**sound, **half}, asked)
    assert found["passed"] is False
    assert said in found["detail"]

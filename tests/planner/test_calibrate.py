"""Calibration on gloo ranks: the file it writes is one that the planner reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_helix.commands.calibrate import calibrate as command
from megatron_helix.launching import launchers
from megatron_helix.launching.launcher_config import LauncherConfig
from megatron_helix.machine import hardware, hopper
from megatron_helix.planner import calibrate
from megatron_helix.planner.book import share
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from tests.distributed import run_distributed
from tests.planner.planner_case import CALIBRATED


def test_what_is_measured_can_be_planned_with(tmp_path: Path) -> None:
    said = calibrate.on_cpu(2, tmp_path / "made" / "here.yaml")
    assert "all_to_all" in said
    machine = hardware.load(tmp_path / "made" / "here.yaml")
    assert (machine.devices, machine.devices_per_node, machine.element_bytes) == (2, 2, 4)
    assert "helix calibrate" in machine.gemm.source
    assert machine.host is None  # a CPU computes itself
    assert [time.core for time in machine.core_attention] == ["spec", "prefix"]
    model = read_config(ModelConfig, Path("configs/models/tiny_dense.yaml"))
    layout = LayoutConfig(name="tp2", tp=2, micro_batch=1)
    batch = BatchConfig(sequences=2, sequence_length=64)
    one = predict(Deployment(model, layout, batch, 2, precision="fp32").check(), machine)
    assert one.tokens_per_s > 0


def test_what_only_whole_steps_show_is_of_the_card(tmp_path: Path) -> None:
    cards = {"NVIDIA H200": True, "NVIDIA H100 80GB HBM3": True, "NVIDIA B200": False}
    for card, known in cards.items():
        calibrate.write({**CALIBRATED, "name": f"2 x {card}"}, tmp_path / "here.yaml")
        found = hardware.load(tmp_path / "here.yaml")
        of_steps = {key: getattr(found, key) for key in hopper.OF_WHOLE_STEPS}
        of_hopper = {key: getattr(hopper.HOPPER, key) for key in of_steps}
        assert (of_steps == of_hopper) == known
        assert (found.gap is not None) == known


def test_a_ring_of_keys_is_taken_to_hide_what_replicas_do(tmp_path: Path) -> None:
    """Nobody measures it; a rival's ring would be predicted as if nothing of it were hidden."""
    beside = {"replicas": {"hidden": 0.4, "slowed": 0.5}}
    calibrate.write({**CALIBRATED, "beside": beside}, tmp_path / "here.yaml")
    found = hardware.load(tmp_path / "here.yaml").beside
    assert (found["keys"].hidden, found["keys"].slowed) == (0.4, 0.5)
    assert found["keys"].source.startswith("assumption; as replicas")


def _two_nodes_of_two() -> dict:
    return calibrate.measure("cpu", 2)


def test_each_level_of_links_is_measured(tmp_path: Path) -> None:
    """Four ranks that are told they are two nodes: the file has both levels, all ranks agree."""
    ranks = run_distributed(_two_nodes_of_two, 4)
    assert all(rank["links"] == ranks[0]["links"] for rank in ranks)
    calibrate.write(ranks[0], tmp_path / "here.yaml")
    machine = hardware.load(tmp_path / "here.yaml")
    assert (machine.devices, machine.devices_per_node) == (4, 2)
    assert machine.inter_node is not None
    levels = ranks[0]["links"]
    assert list(levels) == ["intra_node", "inter_node"]
    # What was timed is predicted again: of three kinds the one whose figures are the medians.
    for level, link in (("intra_node", machine.intra_node), ("inter_node", machine.inter_node)):
        middle = sorted(bandwidth for bandwidth, _ in levels[level].values())[1]
        assert link.bandwidth.peak == pytest.approx(middle, rel=1e-3)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all"])
def test_calibration_inverts_the_cost_of_a_collective(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that the planner gives a known machine are taken for measured: the machine is found."""
    machine = hardware.load(Path("configs/hardware/h100_2x8_ib.yaml"))
    assert machine.inter_node is not None
    group = SimpleNamespace(size=lambda: 16)
    asked = []
    monkeypatch.setattr(calibrate, "_collective", lambda kind, x, _group: (kind, x.nbytes))

    def clock(call: tuple[str, int]) -> float:
        asked.append(call)
        sent = call[1] * share(call[0], 16)
        return machine.seconds(call[0], sent, 1, 16, 1)

    found = calibrate._links(group, 8, clock, torch.ones(2**22, dtype=torch.half))  # type: ignore[arg-type]
    bandwidth, latency = found[kind]
    assert len(asked) == 6
    assert latency == pytest.approx(machine.inter_node.latency.rate, rel=1e-3)
    # What the links of a node do not allow is not seen of those between nodes.
    near = hardware.crossing(kind, 16, 8) * machine.intra_node.bandwidth.rate
    assert bandwidth == pytest.approx(min(machine.inter_node.bandwidth.rate, near), rel=1e-3)


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out: .*file must be a folder that can be made"):
        calibrate.on_cpu(2, tmp_path / "file" / "here.yaml")
    with pytest.raises(ValueError, match="--out: must be a file to write, got the folder"):
        calibrate.on_cpu(2, tmp_path)


def test_all_gpus_of_a_machine_are_ranks_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = run_distributed(_two_nodes_of_two, 4)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    out = tmp_path / "made" / "here.yaml"

    def start(kind: LauncherConfig, program: launchers.Program, ranks: int, logs: Path) -> None:
        assert (kind.kind, ranks) == ("torchrun", 4)
        assert program.words == ["megatron_helix.planner.calibrate", "--out", str(out)]
        logs.mkdir()
        calibrate.write(measured, out)

    said: list[str] = []
    monkeypatch.setattr(launchers, "start", start)
    monkeypatch.setattr("typer.echo", said.append)
    command(out)
    assert said[0].startswith(f"{out}: 4 CPU ranks, gloo: GEMM ")
    assert list(out.parent.iterdir()) == [out]


def test_calibrate_under_torchrun_says_what_to_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank of it would measure the machine anew, at the same time."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"^helix calibrate: must be called once, .* got torchrun"):
        command(tmp_path / "here.yaml")

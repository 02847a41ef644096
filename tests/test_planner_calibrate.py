"""Calibration on gloo ranks: the file it writes is one that the planner reads."""

from pathlib import Path

import pytest

from megatron_helix.planner import calibrate, hardware
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config import BatchConfig, LayoutConfig, ModelConfig, read_config


def test_what_is_measured_can_be_planned_with(tmp_path: Path) -> None:
    said = calibrate.on_cpu(2, tmp_path / "here.yaml")
    assert "all_to_all" in said
    machine = hardware.load(tmp_path / "here.yaml")
    assert (machine.devices, machine.devices_per_node, machine.element_bytes) == (2, 2, 4)
    assert "helix calibrate" in machine.gemm.source
    model = read_config(ModelConfig, Path("configs/models/tiny_dense.yaml"))
    layout = LayoutConfig(name="tp2", tp=2, micro_batch=1)
    batch = BatchConfig(sequences=2, sequence_length=64)
    one = predict(Deployment(model, layout, batch, 2).check(), machine)
    assert one.tokens_per_s > 0


def test_no_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out: .* must be a folder"):
        calibrate.on_cpu(2, tmp_path / "missing" / "here.yaml")

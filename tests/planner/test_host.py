"""A step takes at least as long as its processes need to start it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_helix.machine import hardware
from megatron_helix.machine.hardware import Hardware
from megatron_helix.machine.quantities import Host
from megatron_helix.planner import calibrate, core_timing, host_timing
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from tests.distributed import run_distributed
from tests.planner.planner_case import CALIBRATED, DENSE, MACHINES

BATCH = BatchConfig(sequences=8, sequence_length=512)


def starting(forward_us: float, backward_us: float) -> Hardware:
    """Four GPUs whose processes take so long for a layer."""

    def quantity(value: float) -> dict[str, Any]:
        return {"value": value, "unit": "us", "source": "case"}

    host = Host.model_validate({"forward": quantity(forward_us), "backward": quantity(backward_us)})
    return MACHINES["h200_4"].model_copy(update={"host": host})


def deployed(**keys: Any) -> Deployment:
    """The dense model on four ranks, in four micro-batches."""
    layout = LayoutConfig(name="case", **{"tp": 4, "micro_batch": 2, **keys})
    return Deployment(DENSE, layout, BATCH, 4, precision="bf16").check()


@pytest.mark.parametrize("keys", [{}, {"tp": None, "m": 2, "n": 2, "exchange": "weights"}])
def test_a_process_that_is_slower_than_its_gpu_sets_the_time(keys: dict[str, Any]) -> None:
    here = deployed(**keys)
    quick, slow = (predict(here, starting(us, 2 * us)) for us in (0.001, 1e6))
    assert quick.step_s == predict(here, MACHINES["h200_4"]).step_s
    every = DENSE.num_layers * here.microbatches
    assert slow.step_s == pytest.approx(every * 3.0, rel=0.02)  # and what comes once a step
    assert slow.tpot_ms == pytest.approx(
        quick.tpot_ms
    )  # it waits for its own process, not for another rank
    (term,) = (term for term in slow.terms if term.what == "processes start kernels")
    assert term.bound == "launch"
    assert all(term.what != "processes start kernels" for term in quick.terms)


def test_a_forward_pass_starts_no_backward_pass() -> None:
    here = replace(deployed(), phase="forward").check()
    every = DENSE.num_layers * here.microbatches
    assert predict(here, starting(1e6, 5e6)).step_s == pytest.approx(every, rel=0.02)


def test_what_a_process_takes_must_be_a_time() -> None:
    document = starting(1.0, 2.0).model_dump()
    document["host"]["forward"]["unit"] = "GB/s"
    with pytest.raises(ValueError, match="unit must be one of us, got 'GB/s'"):
        Hardware.model_validate(document)


def of_a_layer() -> dict[str, float]:
    """As on a GPU, by the layer that is there on a CPU."""
    from megatron_helix.upstream import cpu_device

    cpu_device.enable()
    with core_timing.alone():
        return host_timing.measure("cpu")


def test_what_is_measured_of_a_process_is_written(tmp_path: Path) -> None:
    (found,) = run_distributed(of_a_layer, 1)
    assert min(found.values()) > 0
    calibrate.write({**CALIBRATED, "host": found}, tmp_path / "here.yaml")
    host = hardware.load(tmp_path / "here.yaml").host
    assert host is not None
    assert (host.forward.rate, host.backward.rate) == pytest.approx((*found.values(),), rel=1e-3)

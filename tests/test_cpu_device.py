"""``torch.cuda`` answered by the CPU: what Megatron asks of it, in the sense Megatron asks it."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward

from megatron_helix import cpu_device

CPU = torch.device("cpu")


def test_it_is_on_and_turning_it_on_again_changes_nothing() -> None:
    assert cpu_device.is_enabled()
    answers = torch.cuda.is_available, torch.Tensor.cuda
    cpu_device.enable()
    assert (torch.cuda.is_available, torch.Tensor.cuda) == answers


def test_import_alone_turns_nothing_on() -> None:
    script = """
import torch
before = torch.cuda.is_available, torch.cuda.Stream, torch.Tensor.cuda
from megatron_helix import cpu_device
assert not cpu_device.is_enabled()
assert (torch.cuda.is_available, torch.cuda.Stream, torch.Tensor.cuda) == before
torch.cuda.is_available = lambda: True  # a machine with a GPU
try:
    cpu_device.enable()
except RuntimeError as error:
    print(error)
assert not cpu_device.is_enabled()
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert "the CPU device was asked for on a machine with a GPU" in said
    assert "CUDA_VISIBLE_DEVICES=" in said


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_what_is_made_on_the_gpu_is_on_the_cpu(device: object) -> None:
    made = [
        torch.empty(2, device=device),
        torch.zeros(2, device=device),
        torch.arange(2, device=device),
        torch.tensor([1, 2], device=device),
        torch.zeros_like(torch.ones(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device),
        torch.ones(2).to(device, torch.float64),
        torch.ones(2).new_zeros(2, device=device),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
    ]
    assert {tensor.device for tensor in made} == {CPU}


def test_the_current_device_can_hold_tensors() -> None:
    assert torch.empty(2, device=torch.cuda.current_device()).device == CPU
    assert torch.ones(2).cuda().device == CPU
    assert torch.ones(2).cuda(0, non_blocking=True).device == CPU
    assert torch.nn.Linear(2, 2).cuda().weight.device == CPU


def test_tensors_that_name_no_device_are_untouched() -> None:
    assert torch.ones(2, device="meta").device.type == "meta"
    assert torch.ones(2, device="cpu").device == CPU
    assert torch.ones(2).to(torch.float64).dtype == torch.float64


def test_the_type_of_a_tensor_is_that_on_a_gpu() -> None:
    """Megatron's optimizers sort parameters by it."""
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type(torch.int64).dtype == torch.int64
    assert torch.ones(2).is_cuda


class _MakesBuffers(torch.autograd.Function):
    """As Megatron's collectives do, which make their buffers on the current device."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x + torch.zeros(x.shape, device=torch.cuda.current_device())

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        del ctx
        return grad + torch.zeros(grad.shape, device=torch.cuda.current_device())


BACKWARDS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "tensor": lambda y, x: y.backward(inputs=[x]),
    "autograd": lambda y, x: torch.autograd.backward(y),
    "grad": lambda y, x: setattr(x, "grad", torch.autograd.grad(y, x)[0]),
    "megatron": lambda y, x: custom_backward(y, None),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_pass_makes_its_buffers_on_the_cpu_too(name: str) -> None:
    x = torch.ones(3, requires_grad=True)
    BACKWARDS[name](_MakesBuffers.apply(x).sum(), x)
    assert torch.equal(x.grad, torch.ones(3))


def test_events_measure_milliseconds_of_wall_clock() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    clock = time.perf_counter()
    start.record()
    time.sleep(0.02)
    end.record()
    passed_ms = (time.perf_counter() - clock) * 1e3
    # The clock around the events has seen all that they have, and they have seen the sleep.
    assert 20 <= start.elapsed_time(end) <= passed_ms
    assert start.query()
    end.synchronize()


def test_streams_are_the_order_of_the_program() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(2, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_event(stream.record_event())
    x.record_stream(stream)
    stream.synchronize()
    torch.cuda.synchronize()
    assert stream.query()


def test_the_random_state_can_be_kept_and_put_back() -> None:
    for get, put in (
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        (torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state),
        (torch.cuda.default_generators[0].get_state, torch.cuda.default_generators[0].set_state),
    ):
        torch.cuda.manual_seed(7)
        state = get()
        first = torch.rand(4, device="cuda")
        assert not torch.equal(torch.rand(4, device="cuda"), first)
        put(state)
        assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_memory_statistics_are_zero_whatever_they_are_called() -> None:
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    assert torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.mem_get_info() == (0, 0)


def test_memory_that_should_be_pinned_is_not() -> None:
    """Pinning needs the driver; Megatron asks for it under context parallelism."""
    assert torch.tensor([1, 2], device="cpu", pin_memory=True).tolist() == [1, 2]

"""``torch.cuda`` answered by the CPU: what Megatron asks of it, in the sense Megatron asks it."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, Dataset

from megatron_helix.upstream import cpu_device
from tests.distributed import run_distributed

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
from megatron_helix.upstream import cpu_device
assert not cpu_device.is_enabled()
assert (torch.cuda.is_available, torch.cuda.Stream, torch.Tensor.cuda) == before
torch.cuda.is_available = lambda: True  # a machine with a GPU
try:
    cpu_device.enable()
except ValueError as error:
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


ON_CUDA: dict[str, Callable[[], torch.Tensor]] = {
    "dropout": lambda: dropout(torch.ones(64)),
    "a device": lambda: torch.rand(4, device="cuda"),
    "the current device": lambda: torch.rand(4, device=torch.cuda.current_device()),
    "the device of a tensor": lambda: torch.rand(4, device=torch.ones(1).device),
    "like a tensor": lambda: torch.rand_like(torch.ones(4)),
    "of a tensor": lambda: torch.bernoulli(torch.full((64,), 0.5)),
    "into a tensor": lambda: torch.nn.init.normal_(torch.empty(4)),
    "around a tensor": lambda: torch.normal(torch.zeros(4), 1.0),
}
ON_CPU: dict[str, Callable[[], torch.Tensor]] = {
    "rand": lambda: torch.rand(4),
    "randn": lambda: torch.randn(4),
    "randint": lambda: torch.randint(1 << 30, (4,)),
    "randperm": lambda: torch.randperm(64),
    "normal": lambda: torch.normal(0.0, 1.0, (4,)),
    "a loader": lambda: next(iter(DataLoader(_Noise(), batch_size=2))),
    "a loader that shuffles": lambda: next(iter(DataLoader(_Noise(), batch_size=2, shuffle=True))),
}


class _Noise(Dataset[torch.Tensor]):
    """Items that are drawn when they are asked for, as augmentations are."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.empty(3).uniform_() + torch.rand(3) + torch.rand(3, device="cpu")


@pytest.mark.parametrize("name", [*ON_CUDA, *ON_CPU])
def test_each_draw_moves_one_of_the_two_generators(name: str) -> None:
    draw = (ON_CUDA | ON_CPU)[name]
    mine, other = torch.cuda.random, torch.random
    if name in ON_CPU:
        mine, other = other, mine
    torch.manual_seed(1)
    state, rest = mine.get_rng_state(), other.get_rng_state()
    first = draw()
    assert torch.equal(other.get_rng_state(), rest)
    assert not torch.equal(draw(), first)
    mine.set_rng_state(state)
    assert torch.equal(draw(), first)


def test_a_loader_goes_on_drawing_where_it_stopped() -> None:
    torch.manual_seed(5)
    items = [item for _ in range(2) for item in DataLoader(_Noise(), shuffle=True)]
    assert len({tuple(item.flatten().tolist()) for item in items}) == len(items)
    torch.manual_seed(5)
    again = [item for _ in range(2) for item in DataLoader(_Noise(), shuffle=True)]
    assert torch.equal(torch.stack(again), torch.stack(items))


def test_a_seed_reaches_both_generators_in_a_forked_rank() -> None:
    """Where CUDA was in use before a fork, torch would leave CUDA's alone there."""

    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return [torch.rand(4), torch.empty(4).uniform_()]

    for once, again in zip(*run_distributed(lambda: (drawn(), drawn()), 1)[0], strict=True):
        assert torch.equal(once, again)


def test_seeds_reach_the_generators_they_name() -> None:
    torch.manual_seed(7)
    both = torch.rand(4), torch.rand(4, device="cuda")
    assert torch.equal(*both)
    assert (torch.initial_seed(), torch.cuda.initial_seed()) == (7, 7)
    for seed in (torch.cuda.manual_seed, torch.cuda.manual_seed_all):
        torch.manual_seed(7)
        seed(8)
        assert (torch.initial_seed(), torch.cuda.initial_seed()) == (7, 8)
        assert torch.equal(torch.rand(4), both[0])
        assert not torch.equal(torch.rand(4, device="cuda"), both[1])
    for seed in (torch.cuda.seed, torch.cuda.seed_all):
        torch.manual_seed(7)
        seed()
        assert torch.initial_seed() == 7
        assert torch.cuda.initial_seed() != 7
    torch.seed()
    assert torch.initial_seed() == torch.cuda.initial_seed()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_the_random_state_can_be_kept_and_put_back(device: str | int | torch.device) -> None:
    def put_all(state: list[torch.Tensor]) -> None:
        torch.cuda.set_rng_state_all(state)

    generator = torch.cuda.default_generators[0]
    for get, put in (
        (lambda: torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device)),
        (torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state),
        (torch.cuda.get_rng_state_all, put_all),
        (generator.get_state, generator.set_state),
    ):
        torch.cuda.manual_seed(7)
        state = get()
        first = torch.rand(4, device="cuda")
        assert not torch.equal(torch.rand(4, device="cuda"), first)
        put(state)
        assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_a_fork_of_both_puts_both_back() -> None:
    torch.manual_seed(3)
    with torch.random.fork_rng(device_type="cuda"):
        inside = torch.rand(4), dropout(torch.ones(64))
    after = torch.rand(4), dropout(torch.ones(64))
    assert all(torch.equal(*pair) for pair in zip(inside, after, strict=True))
    with torch.random.fork_rng(devices=[]):  # the CPU's own alone
        inside = torch.rand(4), dropout(torch.ones(64))
    after = torch.rand(4), dropout(torch.ones(64))
    assert torch.equal(inside[0], after[0])
    assert not torch.equal(inside[1], after[1])


def test_dropout_follows_the_tracker_and_does_not_touch_the_cpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Megatron warns where it does: once a layer and step that would be."""
    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("of this rank", 2)
    with caplog.at_level(logging.WARNING), tracker.fork("of this rank"):
        forked = dropout(torch.ones(64))
    assert not caplog.records
    outside = dropout(torch.ones(64))
    torch.manual_seed(2)
    assert torch.equal(dropout(torch.ones(64)), forked)
    torch.manual_seed(1)
    assert torch.equal(dropout(torch.ones(64)), outside)


def test_memory_statistics_are_zero_whatever_they_are_called() -> None:
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    assert torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.mem_get_info() == (0, 0)


def test_memory_that_should_be_pinned_is_not() -> None:
    """Pinning needs the driver; Megatron asks for it under context parallelism."""
    assert torch.tensor([1, 2], device="cpu", pin_memory=True).tolist() == [1, 2]

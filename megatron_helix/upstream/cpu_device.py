"""Answer ``torch.cuda`` with the CPU, so that Megatron's own loop runs on gloo ranks.

Megatron-LM asks ``torch.cuda`` for devices, streams, events, memory and random state on every
path. :func:`enable` makes those questions answerable on a machine without a GPU: device 0 *is* the
CPU, streams are the program order, events are the wall clock, and the CUDA generator is one of two
(:mod:`megatron_helix.upstream.cpu_generators`). Nothing in Megatron is touched. It is used by
``--helix-device cpu`` and by the tests, and refuses to work where a GPU is present: there the real
thing must be measured.
"""

import contextlib
import functools
import os
import time
import types
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._device import _device_constructors

from megatron_helix.basics.errors import UserError
from megatron_helix.upstream import cpu_generators, gloo

_CPU = torch.device("cpu")
_MARK = "helix_cpu_device"  # an attribute of torch.cuda, so that forks know too


def is_enabled() -> bool:
    """Whether :func:`enable` has been called in this process (or in the parent it forked from)."""
    return getattr(torch.cuda, _MARK, False)


def enable() -> None:
    """Make ``torch.cuda`` answer as one CPU device, for this process and the ones it forks.

    Call it before Megatron is imported: some of its modules bind ``torch.cuda`` names at import.

    Raises:
        UserError: when the process sees a real GPU.
    """
    if is_enabled():
        return
    if torch.cuda.is_available():
        raise UserError(
            "the CPU device was asked for on a machine with a GPU: use --helix-device cuda, or hide"
            " the GPU with CUDA_VISIBLE_DEVICES= to rehearse on the CPU"
        )
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile has nothing to fuse for
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports that there is no GPU
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, the CPU has none
    for name, value in _cuda_answers().items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):  # bound by name when it was imported
            setattr(torch.cuda.random, name, value)
    cpu_generators.tell_apart()
    torch.accelerator.is_available = lambda: False
    # Megatron's optimizers sort parameters by ``type()``; its MoE layer brings token counts to the
    # host where ``is_cuda``. Native code, c10d among it, looks at the memory itself.
    tensor_answers = {
        "is_cuda": property(lambda self: True),
        "cuda": lambda self, *args, **kwargs: self,
        "record_stream": lambda self, stream: None,
        "type": _type_as_on_cuda,
    }
    for name, value in tensor_answers.items():
        setattr(torch.Tensor, name, value)
    torch.nn.Module.cuda = lambda self, device=None: self
    DeviceMesh.from_group = staticmethod(_mesh_of_cpus(DeviceMesh.from_group))
    gloo.fill_in()
    _divert()
    setattr(torch.cuda, _MARK, True)


class _Stream:
    """Program order as a stream: every wait is already over."""

    cuda_stream = 0
    device = _CPU
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def _done(self, *args: Any) -> None:
        """All work before this call has finished, because it ran on this thread."""

    synchronize = wait_stream = wait_event = _done

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class _Event:
    """A point on the wall clock."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.time_s = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds from this event to ``end``, as ``torch.cuda.Event`` counts them."""
        return (end.time_s - self.time_s) * 1e3

    def query(self) -> bool:
        return True

    def _done(self, *args: Any) -> None:
        """Recorded work has finished, because it ran on this thread."""

    synchronize = wait = _done


def _cuda_answers() -> dict[str, Any]:
    """The attributes of ``torch.cuda`` that Megatron reads, answered for the CPU."""
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count(), total_memory=0
    )

    # A function object for every name: torch.compile's tables refuse one object under two names.
    def returns(value: Any) -> Any:
        return lambda *args, **kwargs: value

    return {
        "is_available": returns(True),
        "is_initialized": returns(True),
        "_is_in_bad_fork": returns(False),  # where it is, torch.manual_seed leaves CUDA's alone
        "_lazy_init": returns(None),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "device_count": returns(1),
        "current_device": returns(0),
        "set_device": returns(None),
        "device": contextlib.nullcontext,
        "get_device_name": returns("cpu"),
        "get_device_capability": returns((0, 0)),
        "get_device_properties": returns(properties),
        "synchronize": returns(None),
        "Stream": _Stream,
        "Event": _Event,
        "stream": contextlib.nullcontext,
        "set_stream": returns(None),
        "current_stream": returns(stream),
        "default_stream": returns(stream),
        "is_current_stream_capturing": returns(False),
        "empty_cache": returns(None),
        "ipc_collect": returns(None),
        "memory_allocated": returns(0),
        "memory_reserved": returns(0),
        "max_memory_allocated": returns(0),
        "max_memory_reserved": returns(0),
        "reset_peak_memory_stats": returns(None),
        "device_memory_used": returns(0),
        "mem_get_info": returns((0, 0)),
        "memory_stats": returns(_ZeroStats()),
    }


class _ZeroStats(dict):
    """Memory statistics of a device that has no allocator: every counter is zero."""

    def __missing__(self, key: str) -> int:
        return 0


_TENSOR_TYPE = torch.Tensor.type


def _type_as_on_cuda(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    """``Tensor.type``, with the type string a CUDA tensor of this dtype has."""
    if dtype is not None:
        return _TENSOR_TYPE(self, dtype, **kwargs)
    return _TENSOR_TYPE(self).replace("torch.", "torch.cuda.", 1)


def _as_cpu(device: Any) -> Any:
    """``device`` as given, or the CPU where it names a CUDA device (by name, object or index)."""
    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int):
        return _CPU
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _mesh_of_cpus(from_group: Any) -> Any:
    """``DeviceMesh.from_group``, for Megatron's torch FSDP2, which asks for a mesh of ``"cuda"``.

    The mesh's device is where FSDP2 expects parameters to be, and whose streams it takes:
    ``torch.cpu`` has some, in program order.
    """

    def mesh(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, str(_as_cpu(device_type)), *args, **kwargs)

    return mesh


def _divert() -> None:
    """Have ``device="cuda"`` mean the CPU to what makes tensors, and to ``Tensor.to``.

    A mode of torch's would see every operation, and cost a small model a tenth of its time.
    """
    likes = (torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like)
    drawn = (torch.normal, torch.rand_like, torch.randint_like, torch.randn_like)
    makers = {*_device_constructors(), *likes, *drawn}
    for module in (torch, torch.fft, torch.nested):
        for name, function in list(vars(module).items()):
            if callable(function) and function in makers:
                setattr(module, name, _on_cpu(function))
    for name in ("empty", "empty_strided", "full", "ones", "tensor", "zeros"):
        setattr(torch.Tensor, f"new_{name}", _on_cpu(getattr(torch.Tensor, f"new_{name}")))
    torch.Tensor.to = _to_cpu(torch.Tensor.to)


def _on_cpu(function: Any) -> Any:
    """A function that makes a tensor, on the CPU where it is told to on CUDA.

    Memory is not pinned: that would need the driver. What the CPU would draw from its own generator
    is drawn from it.
    """

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _as_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if cpu_generators.draws_on_cpu(function, args, kwargs):
            with cpu_generators.drawing_on_cpu():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return on_cpu


def _to_cpu(to: Any) -> Any:
    """``Tensor.to``, with a device as its first argument or by name."""

    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_as_cpu(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = _as_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    return to_cpu

"""Two generators where the CPU has one: its own, and one that stands for CUDA's.

On a machine with a GPU dropout draws from CUDA's generator, the data loader from the CPU's, and
neither moves the other. Replicas rely on it: the ranks of a tensor-parallel group drop the same of
what they all hold, and only the first of them loads data.

On the CPU device everything draws from torch's default generator, unless told otherwise. That one
stands for CUDA's: ``torch.cuda`` and Megatron's tracker set its state, and whatever draws, follows.
The CPU's own is another. It is what ``torch.get_rng_state`` and its like speak of, and from it draw

* functions that name neither a tensor nor a device: ``torch.rand(3)``;
* whatever is drawn while a ``DataLoader`` makes a batch.

A tensor does not tell where a GPU machine would have it. So what draws into one that is there draws
from CUDA's generator, the first weights of ``--use-cpu-initialization`` as well. No replica minds:
every rank of a tensor-parallel group draws the whole of them, and comes to the same state.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch.utils.data import DataLoader, dataloader

_DRAWN_FROM = torch.default_generator  # what native code draws from
_SET_ASIDE = torch.Generator()
_FROM_NOTHING = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}


def tell_apart() -> None:
    """Give the CPU a generator beside CUDA's, for the life of the process."""
    _SET_ASIDE.set_state(_DRAWN_FROM.get_state())
    _name(cpu=_SET_ASIDE, cuda=_DRAWN_FROM)
    DataLoader.__iter__ = _on_cpu(DataLoader.__iter__)
    batches: Any = dataloader._BaseDataLoaderIter
    batches.__next__ = _on_cpu(batches.__next__)


def draws_on_cpu(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a GPU machine would draw what this call asks for from the CPU's own generator."""
    if function not in _FROM_NOTHING or kwargs.get("device") is not None:
        return False
    return not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))


@contextlib.contextmanager
def drawing_on_cpu() -> Iterator[None]:
    """Draw from the CPU's own generator."""
    if torch.default_generator is _DRAWN_FROM:  # already
        yield
        return
    _exchange_states()
    _name(cpu=_DRAWN_FROM, cuda=_SET_ASIDE)
    try:
        yield
    finally:
        _exchange_states()
        _name(cpu=_SET_ASIDE, cuda=_DRAWN_FROM)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with drawing_on_cpu():
            return function(*args, **kwargs)

    return on_cpu


def _exchange_states() -> None:
    state = _DRAWN_FROM.get_state()
    _DRAWN_FROM.set_state(_SET_ASIDE.get_state())
    _SET_ASIDE.set_state(state)


def _name(*, cpu: torch.Generator, cuda: torch.Generator) -> None:
    """Where torch's own functions look for them: those of ``torch.random`` and ``torch.cuda``."""
    for module in (torch, torch.random):
        setattr(module, "default_generator", cpu)  # noqa: B010  # not in what either exports
    torch.cuda.default_generators = (cuda,)

"""What a process holds in its modules, to go back to.

Megatron keeps what a run set up in globals of its modules and attributes of its classes, and has no
call that forgets all of it. :class:`Snapshot` needs no list of them: it keeps every module and
class as it is, and puts back whatever is not the same any more.
"""

import gc
import os
import sys
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import torch


class Snapshot:
    """The modules below some names, with their classes and what both hold, as they are now.

    What a module or class holds are its attributes; of these the dicts, lists and sets, and the
    objects whose class is of one of the modules, hold something in turn.

    Args:
        packages: names of packages or modules, as in ``sys.modules``.
        classes: further classes, of other modules.
    """

    def __init__(self, *packages: str, classes: tuple[type, ...] = ()):
        self._packages = packages
        self._spaces: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._holders: dict[int, tuple[Any, Any]] = {}
        self._caches: dict[int, Any] = {}
        for name, module in list(sys.modules.items()):
            if module and self._is_ours(name):
                self._keep(module)
        for one in classes:
            self._spaces[id(one)] = one, dict(vars(one))
        self._environment, self._argv = dict(os.environ), list(sys.argv)

    def restore(self) -> None:
        """Put every attribute and every content back; empty what functions remember."""
        for space, kept in self._spaces.values():
            _put_back(space, kept)
        for holder, kept in self._holders.values():
            if not _same(holder, kept):
                holder.clear()
                (holder.extend if isinstance(holder, list) else holder.update)(kept)
        for function in self._caches.values():
            function.cache_clear()
        os.environ.clear()
        os.environ.update(self._environment)
        sys.argv[:] = self._argv
        gc.enable()

    def _is_ours(self, name: str) -> bool:
        return any(name == package or name.startswith(f"{package}.") for package in self._packages)

    def _keep(self, thing: Any) -> None:
        """Keep ``thing`` and what it holds, once."""
        if id(thing) in self._spaces or id(thing) in self._holders:
            return
        if isinstance(thing, (dict, list, set)):
            self._holders[id(thing)] = thing, thing.copy()
        elif self._has_space(thing):
            self._spaces[id(thing)] = thing, dict(vars(thing))
        elif hasattr(thing, "cache_clear"):
            self._caches[id(thing)] = thing
        for value in self._held(thing):
            self._keep(value)

    def _has_space(self, thing: Any) -> bool:
        if isinstance(thing, ModuleType):
            return self._is_ours(thing.__name__)
        kind = thing if isinstance(thing, type) else type(thing)
        return self._is_ours(kind.__module__) and not issubclass(kind, Enum) and _has_dict(thing)

    def _held(self, thing: Any) -> Iterator[Any]:
        if id(thing) in self._spaces:
            kept = self._spaces[id(thing)][1]
            yield from (value for name, value in kept.items() if not name.startswith("__"))
        elif id(thing) in self._holders:
            yield from thing.values() if isinstance(thing, dict) else thing


def _has_dict(thing: Any) -> bool:
    try:
        vars(thing)
    except TypeError:
        return False
    return True


def _put_back(space: Any, kept: dict[str, Any]) -> None:
    """Names of Python's own that were added since stay, and so do submodules."""
    now = vars(space)
    changed = {name: value for name, value in kept.items() if now.get(name, kept) is not value}
    for name, value in changed.items():
        setattr(space, name, value)
    for name in [name for name in now if name not in kept]:
        if not name.startswith("__") and not isinstance(now[name], ModuleType):
            delattr(space, name)


def _same(holder: Any, kept: Any) -> bool:
    """Whether it holds the very same objects."""
    if len(holder) != len(kept):
        return False
    if isinstance(holder, dict):
        return all(holder.get(key, kept) is value for key, value in kept.items())
    if isinstance(holder, set):
        return holder == kept
    return all(a is b for a, b in zip(holder, kept, strict=True))


def forget_models() -> None:
    """Free the models that were made since ``gc.freeze()``, and their process groups.

    Python cannot free them by itself where a module keeps a tensor with its graph, as dispatchers
    of MoE layers do: the graph, which is torch's, holds hooks that hold the model. Programs stay,
    which the compiler keeps for the next model.
    """
    for thing in gc.get_objects():
        kind = type(thing)  # a proxy of what is gone has no class to ask
        if issubclass(kind, torch.nn.Module) and not issubclass(kind, torch.fx.GraphModule):
            vars(thing).clear()
    gc.collect()

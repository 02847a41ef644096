"""Memory, counted on the tensors: what torch's CPU allocator does not say."""

import threading
import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GLOO_LETS_GO_S = 0.005


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside it made and nobody has let go; the most ever.

    A thread of gloo wakes who waits for a collective before it drops the collective's tensors.
    So at each new peak that thread gets its turn first: what it alone still holds does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()  # a storage dies in the thread that drops it last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._storage(x)._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_tensor(tensor) and self._storage(tensor)._cdata not in before | self._known:
                self._count(self._storage(tensor))
        return result

    @staticmethod
    def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
        return tensor.untyped_storage()

    def _count(self, storage: torch.UntypedStorage) -> None:
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        with self._lock:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
        if self.now > self.peak:
            time.sleep(GLOO_LETS_GO_S)
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, nbytes: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.now -= nbytes


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)

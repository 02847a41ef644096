"""Gloo as Megatron needs it on CPU ranks.

What is asked of collectives and gloo does not do is done by its all-to-all:

* A reduce-scatter that sends what one must. Gloo's is an all-reduce of which each rank keeps a
  part: twice the bytes, counted at the network interface. An all-to-all and a local sum send each
  chunk once, to the rank that needs it.
* An all-gather of tensors of unequal size, as of the tokens that expert tensor parallelism gathers
  after routing. Gloo refuses it. In an all-to-all every rank sends its tensor to every other.

Both replace methods of ``ProcessGroup`` that every rank calls: the ledger, which stands around them
(:mod:`megatron_helix.recording.comm_ledger`), counts the collective that was asked for.

Every process group has a thread that looks at its sockets, a hundred times a second when nothing
comes. Of Megatron's thirty groups on each of many ranks these cost a fifth of two cores: here the
groups of a process share the first one's.
"""

import os
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

_GROUP = dist.ProcessGroup
_SWAP = "all_to_all_single" if hasattr(_GROUP, "all_to_all_single") else "alltoall_base"
_SUM_PARTS = _SWAP.replace("all_to_all", "reduce_scatter").replace("alltoall", "_reduce_scatter")


def fill_in() -> None:
    """Replace the two methods, and share sockets, in this process and the ones it forks."""
    gloo: Any = dist.ProcessGroupGloo
    gloo.__init__ = _on_shared_devices(gloo.__init__)
    swap = getattr(_GROUP, _SWAP)
    setattr(_GROUP, _SUM_PARTS, _reduce_scatter(getattr(_GROUP, _SUM_PARTS), swap))
    _GROUP.allgather = _all_gather(_GROUP.allgather, swap)


def _on_shared_devices(original: Any) -> Any:
    def init(self: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        devices = _devices(os.getpid())
        if devices and not given and named.keys() == {"timeout"}:
            options = type(self)._Options()
            options._devices, options._timeout = devices, named["timeout"]
            given, named = (options,), {}
        original(self, store, rank, size, *given, **named)
        if not devices:
            devices.extend(self.options._devices)

    return init


@lru_cache(maxsize=1)
def _devices(process: int) -> list[Any]:
    """Those of a process's first group, once it has one; a fork has threads of its own."""
    return []


def _reduce_scatter(original: Any, swap: Any) -> Any:
    def reduce_scatter(
        self: dist.ProcessGroup, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> Any:
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            return original(self, output, input, opts)
        parts = torch.empty_like(input)
        work = swap(self, parts, input, [], [], dist.AllToAllOptions())
        work.wait()
        torch.sum(parts.view(self.size(), *output.shape), dim=0, out=output)
        return work

    return reduce_scatter


def _all_gather(original: Any, swap: Any) -> Any:
    def all_gather(self: dist.ProcessGroup, outputs: Any, inputs: Any, *opts: Any) -> Any:
        sizes = [output.numel() for output in outputs[0]]  # the same list on every rank
        if len(set(sizes)) == 1:
            return original(self, outputs, inputs, *opts)
        (mine,) = inputs
        gathered = mine.new_empty(sum(sizes))
        sent = mine.reshape(-1).repeat(self.size())
        to_each = [mine.numel()] * self.size()
        work = swap(self, gathered, sent, sizes, to_each, dist.AllToAllOptions())
        work.wait()
        for output, part in zip(outputs[0], gathered.split(sizes), strict=True):
            output.copy_(part.view(output.shape))
        return work

    return all_gather

"""Rank 0 of many, alone on one GPU: ``megatron_helix.pretrain_gpt`` without the other ranks.

    LD_PRELOAD=libstandin.so WORLD_SIZE=2 python rank.py FLAGS ...

With the stand-in for NCCL (``nccl.cu``) every collective takes the time of a link and gives copies
of what this rank sent. Kernels, their times and memory are those of a rank; losses are not.

Set by ``run.py``: ``WORLD_SIZE``; ``ONE_RANK_GATE``, a file to wait for when all imports are done.
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = os.environ["WORLD_SIZE"]
    os.environ.update(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megatron_helix import pretrain_gpt

    alone(port)
    flags = pretrain_gpt.prepare_rank(sys.argv[1:])
    own_words()
    own_memory()
    logs_as_the_last()
    gate = os.environ.get("ONE_RANK_GATE")
    while gate and not Path(gate).exists():
        time.sleep(0.05)
    pretrain_gpt.train(flags)


def alone(port: int) -> None:
    """Let torch's process groups begin without waiting for ranks that do not exist."""
    from torch import distributed
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    begin = distributed.init_process_group

    def without_others(*_: Any, world_size: int = -1, timeout: Any = None, **__: Any) -> None:
        ranks = int(os.environ["WORLD_SIZE"])
        store = TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
        begin("nccl", store=store, rank=0, world_size=ranks, timeout=timeout)

    distributed.init_process_group = without_others


def own_words() -> None:
    """Word ids lie in this rank's part of the vocabulary.

    Of a word of another rank it has a row of zeros, to which nobody adds here; activations of zeros
    draw less power than a training's.
    """
    from megatron.core.tensor_parallel import layers

    forward = layers.VocabParallelEmbedding.forward

    def within(self: Any, input_: Any) -> Any:
        return forward(self, input_ % self.num_embeddings_per_partition)

    layers.VocabParallelEmbedding.forward = within


def own_memory() -> None:
    """What a rank reads of its peers' memory it reads of its own, at the rate of that."""
    import torch

    from megatron_helix.kernels import symmetric_memory
    from megatron_helix.layers import lending

    class OwnMemory:
        def __init__(self, group: Any) -> None:
            self.group = group

        def place(self, elements: int, dtype: Any, device: Any) -> tuple[Any, list[Any]]:
            own = torch.empty(elements, dtype=dtype, device=device)
            return own, [own] * self.group.size()

        def barrier(self) -> None: ...

    symmetric_memory.within_reach = lambda group: group.size() > 1
    lending.SymmetricMemory = OwnMemory


def logs_as_the_last() -> None:
    """Megatron's log, which the last rank writes, is written here."""
    from megatron.training.utils import common_utils

    common_utils.is_last_rank = lambda: True


if __name__ == "__main__":
    main()

"""One rank of many, alone on one GPU: ``megatron_helix.pretrain_gpt`` without the other ranks.

    LD_PRELOAD=libstandin.so RANK=1 WORLD_SIZE=2 python rank.py FLAGS ...

With the stand-in for NCCL (``nccl.cu``) every collective takes the time of a link and gives copies
of what this rank sent. Kernels, their times and memory are those of a rank; losses are not. With
``--helix-device cpu`` torch's fake process groups rehearse it.

Set by ``run.py``: ``RANK`` and ``WORLD_SIZE``; ``ONE_RANK_GATE``, a file to wait for when all
imports are done.
"""

import itertools
import os
import socket
import sys
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ID_BYTES = 128  # of ncclUniqueId
PATIENCE = timedelta(seconds=60)  # for what no other rank will ever store


def main() -> None:
    """Run the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = os.environ["WORLD_SIZE"]
    os.environ.setdefault("RANK", "0")
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE=ranks)  # there is one GPU
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megatron_helix import pretrain_gpt
    from megatron_helix.options import arguments

    alone(port, "fake" if arguments.device(sys.argv[1:]) == "cpu" else "nccl")
    flags = pretrain_gpt.prepare_rank(sys.argv[1:])
    own_words()
    own_data()
    own_log()
    gate = os.environ.get("ONE_RANK_GATE")
    while gate and not Path(gate).exists():
        time.sleep(0.05)
    pretrain_gpt.train(flags)


def alone(port: int, backend: str) -> None:
    """Let torch's process groups begin without waiting for ranks that do not exist."""
    from torch import distributed
    from torch.distributed import (
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        distributed_c10d,
    )

    if backend == "fake":
        import_module("torch.testing._internal.distributed.fake_pg")  # which registers itself

    begin = distributed.init_process_group
    ranks = int(os.environ["WORLD_SIZE"])
    prefixed = distributed_c10d.PrefixStore

    def without_others(*_: Any, timeout: Any = None, **__: Any) -> None:
        store = TCPStore(
            "127.0.0.1", port, 1, is_master=True, wait_for_workers=False, timeout=PATIENCE
        )
        rank = int(os.environ["RANK"])
        begin(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)

    def with_ids(prefix: str, store: Any) -> Any:
        """With ids of communicators, which a group's first rank would store for this one."""
        made = prefixed(prefix, store)
        pairs = itertools.combinations(range(ranks), 2)
        for name in ("0", "1", *(f"{low}:{high}" for low, high in pairs)):
            made.set(name, "1" * ID_BYTES)
        return made

    distributed.init_process_group = without_others
    distributed_c10d.PrefixStore = with_ids


def own_words() -> None:
    """Word ids lie in this rank's part of the vocabulary.

    Of a word of another rank it has a row of zeros, to which nobody adds here; activations of zeros
    draw less power than a training's.
    """
    from megatron.core.tensor_parallel import layers

    forward = layers.VocabParallelEmbedding.forward

    def within(self: Any, input_: Any) -> Any:
        own = input_ % self.num_embeddings_per_partition
        return forward(self, own + self.vocab_start_index)

    layers.VocabParallelEmbedding.forward = within


def own_data() -> None:
    """Each rank reads its batch itself, and makes the index of the data where there is none.

    Otherwise the first tensor-parallel rank reads, and the first of all ranks makes the index.
    """
    from megatron.core import parallel_state
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from torch import distributed

    from megatron_helix.upstream import gpt_data, gpt_training

    class EveryRankReads:
        def __getattr__(self, name: str) -> Any:
            if name == "get_tensor_model_parallel_rank":
                return lambda: 0
            return getattr(parallel_state, name)

    index = GPTDataset._build_document_sample_shuffle_indices

    def made_here(self: Any) -> Any:
        rank, distributed.get_rank = distributed.get_rank, lambda *_: 0
        try:
            return index(self)
        finally:
            distributed.get_rank = rank

    gpt_data.parallel_state = gpt_training.parallel_state = EveryRankReads()
    GPTDataset._build_document_sample_shuffle_indices = made_here


def own_log() -> None:
    """Megatron's log, which the last rank writes, and memory, of the first, are written here."""
    from megatron.training import training
    from megatron.training.utils import common_utils

    report = training.report_memory

    def as_the_first(name: str, **_: Any) -> None:
        report(name, process_group=SimpleNamespace(rank=lambda: 0))

    common_utils.is_last_rank = lambda: True
    training.report_memory = as_the_first


if __name__ == "__main__":
    main()

"""Rows of packed documents, and datasets whose rows they are."""

import random
from itertools import accumulate, chain, repeat
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.packed_seq_params import PackedSeqParams

# Lengths of documents in rows of 32 tokens; the last is cut, or ends in another row.
LENGTHS = {
    "equal": [8, 8, 8, 8],
    "very unequal": [1, 2, 21, 3, 1, 4],
    "one token": [1] * 32,
    "one document": [32],
    "padding": [5, 9, 18],  # of the last, the tokens behind the sixth are padding
}


def params(lengths: list[int]) -> PackedSeqParams:
    """Megatron's parameters of a row."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def dataset(prefix: Path, lengths: list[int], tokens: int = 2048) -> Path:
    """A byte-level dataset of documents of these lengths, over and over, shuffled."""
    drawn, builder = random.Random(3), IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8)
    several = list(chain(*repeat(lengths, 1 + tokens // sum(lengths))))
    drawn.shuffle(several)
    for length in several:
        document = [drawn.randrange(1, 256) for _ in range(length)]
        builder.add_document(torch.tensor(document), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix

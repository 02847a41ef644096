"""Sequences of unequal length, packed into rows that helix deals out among its ranks.

A row is one micro-batch. Its sequences are documents that do not see each other
(``packed_seq_params``); what is left of it is one more, which no loss is of.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Written:
    """A prompt and what was written behind it.

    Attributes:
        prompt: token ids.
        answer: token ids, the one that ends it included.
        log_probs: of the answer's tokens when they were drawn; none in the supervised start, which
            a row has as not a number.
        advantage: how much better the answer was than the others to this prompt.
    """

    prompt: list[int]
    answer: list[int]
    log_probs: list[float]
    advantage: float

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tensors ``[1, length]``, and where the documents are; ``[b, length]`` if it is not packed."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    log_probs: torch.Tensor
    packed: Any = None  # Megatron's PackedSeqParams


def pack(sequences: Iterable[Written], length: int) -> list[Row]:
    """Rows of ``length`` tokens, each filled in the order given."""
    return [_row(one, length) for one in _filled(sequences, length)]


def _filled(sequences: Iterable[Written], length: int) -> Iterator[list[Written]]:
    row: list[Written] = []
    for one in sequences:
        if sum(other.length for other in row) + one.length > length:
            yield row
            row = []
        row.append(one)
    yield row


def _row(sequences: list[Written], length: int) -> Row:
    from megatron.core.packed_seq_params import PackedSeqParams  # after the device is chosen

    lengths = [one.length for one in sequences]
    if rest := length - sum(lengths):
        lengths.append(rest)
    columns: dict[str, list[float]] = {name: [] for name in _TYPES}
    for one in sequences:
        whole, before = one.prompt + one.answer, [0.0] * (len(one.prompt) - 1)
        columns["tokens"] += whole[:-1]
        columns["labels"] += whole[1:]
        columns["mask"] += [*before, *[1.0] * len(one.answer)]
        columns["advantages"] += [*before, *[one.advantage] * len(one.answer)]
        columns["log_probs"] += [*before, *(one.log_probs or [math.nan] * len(one.answer))]
    tensors = {
        name: torch.tensor([values + [0] * rest], dtype=_TYPES[name]).cuda()
        for name, values in columns.items()
    }
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).cuda()
    positions = torch.cat([torch.arange(one) for one in lengths])[None].cuda()
    longest = max(lengths)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return Row(positions=positions, packed=packed, **tensors)


_TYPES = {
    "tokens": torch.long,
    "labels": torch.long,
    "mask": torch.float32,
    "advantages": torch.float32,
    "log_probs": torch.float32,
}

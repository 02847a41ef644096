"""Attention gap by gap on CPU ranks: a kernel of plain products in the place of a GPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from megatron_helix.kernels import engine_attention
from megatron_helix.kernels.gap_attention import ALL, Block

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Plain:
    """A kernel that gives its log-sum-exp away; scores in the dtype that it is given, or fp32."""

    def __init__(self, scale: float):
        self.scale = scale

    def forward(
        self, block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Tensors:
        """As the protocol says; what no document has is left as no number at all."""
        output = torch.zeros_like(query)
        lse = query.new_full(query.shape[:-1], torch.nan, dtype=_wide(query))
        for rows, keys in _documents(block):
            scores = self._scores(block, query[rows], key[keys])
            lse[rows] = scores.logsumexp(-1).movedim(-1, 0)
            weights = scores.softmax(-1).to(value.dtype)
            spread = _spread(value[keys], query)
            output[rows] = torch.einsum("...hqk,k...hd->q...hd", weights, spread)
        return output, lse, torch.zeros(0)

    def backward(
        self,
        block: Block,
        grad: torch.Tensor,
        qkv: Tensors,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: torch.Tensor,
    ) -> Tensors:
        """As the protocol says."""
        made = tuple(torch.zeros_like(x) for x in qkv)
        wide = _wide(grad)
        for rows, keys in _documents(block):
            places = zip(qkv, (rows, keys, keys), strict=True)
            query, key, value = (x[at].to(wide) for x, at in places)
            key, value = (_spread(x, query) for x in (key, value))
            one = grad[rows].to(wide)
            scores = self._scores(block, query, key)
            weights = (scores - lse[rows].movedim(0, -1)[..., None]).exp()
            inner = (one * output[rows].to(wide)).sum(-1).movedim(0, -1)[..., None]
            of_weights = torch.einsum("q...hd,k...hd->...hqk", one, value)
            of_scores = weights * (of_weights - inner) * self.scale
            made[0][rows] = torch.einsum("...hqk,k...hd->q...hd", of_scores, key).to(grad.dtype)
            groups = qkv[1].size(-2)
            for total, weighed, of in (made[1], of_scores, query), (made[2], weights, one):
                found = torch.einsum("...hqk,q...hd->k...hd", weighed, of)
                total[keys] = found.unflatten(-2, (groups, -1)).sum(-2).to(grad.dtype)
        return made

    def _scores(self, block: Block, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        wide = _wide(query)
        key = _spread(key, query).to(wide)
        scores = torch.einsum("q...hd,k...hd->...hqk", query.to(wide), key) * self.scale
        if not block.causal:
            return scores
        assert len(query) == len(key)
        hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _spread(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A key of a group for each of its heads."""
    return key.repeat_interleave(query.size(-2) // key.size(-2), dim=-2)


def _documents(block: Block) -> Iterator[tuple[slice, slice]]:
    """Rows and keys of every document."""
    if block.packed is None:
        yield ALL, ALL
        return
    given = block.packed
    firsts = given.first_query.tolist(), given.first_key.tolist()
    lengths = given.queries.diff().tolist(), given.keys.diff().tolist()
    assert max(lengths[0]) == given.most_queries
    assert max(lengths[1]) == given.most_keys
    spans = zip(firsts[0][:-1], lengths[0], firsts[1][:-1], lengths[1], strict=True)
    for row, rows, key, keys in spans:
        yield slice(row, row + rows), slice(key, key + keys)


@contextmanager
def by_gaps() -> Iterator[list[Block]]:
    """Core attention that takes keys of its own tokens, where it could on a GPU.

    Yields the calls that are made in the meantime.
    """
    calls: list[Block] = []

    class Recorded(Plain):
        def forward(self, block: Block, *qkv: torch.Tensor) -> Tensors:
            calls.append(block)
            return super().forward(block, *qkv)

    def kernel_of(core_attention: Any) -> Plain | None:
        config = core_attention.config
        if config.softmax_type != "vanilla" or config.window_size is not None:
            return None
        return Recorded(config.softmax_scale or config.kv_channels**-0.5)

    with mock.patch.object(engine_attention, "kernel_of", kernel_of):
        yield calls

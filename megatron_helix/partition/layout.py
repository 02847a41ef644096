"""The m x n partition of multi-head attention, as pure arithmetic on ranks and indices.

A tensor-parallel group of ``T = m * n`` ranks is cut along two axes:

* the **head axis**, ``n`` head groups, and
* the **dim axis**, ``m`` segments of the head dimension.

Rank ``t`` of the group is ``(i, j) = divmod(t, m)``: it owns segment ``j`` of every head of head
group ``i``. The ``m`` ranks with the same heads are a *dim group*: the dim axis is the fast one,
so they are neighbours. The ``n`` ranks with the same segment are a *head-axis group*. (A head group
is of heads, not of ranks.)

Sharded einsums, with K query groups, slots (the query heads of a group, its gates, its key, its
value) and head dimension d:

* ``W_qkv[K_n, slot, d_m, hidden]``: rank (i, j) stores ``[K/n, slot, d/m, hidden]``;
* ``W_o[hidden, H_n, d_m]``: rank (i, j) stores ``[hidden, H/n, d/m]``.

Which rows of d make a segment: d is viewed as ``[blocks, d / blocks]``, and segment ``j`` takes run
``j`` of m of the second axis. ``blocks`` is 2 with rotate-half rotary embeddings, whose pairs are
``d/2`` apart, so that a segment is closed under rotation; it is 1 otherwise. Q, K, V and the
columns of W_o are cut alike, which makes the exchange of a packed QKV one transposition; since
attention is invariant under a permutation of d common to Q and K, and of one common to V and W_o,
the choice costs nothing.

Where m does not divide a block, runs have ``floor`` or ``ceil`` of it (whole pairs, where rotary
pairs are neighbours), and every tile is stored in the size of the largest segment: ``d/m`` above
and elsewhere is then :attr:`HelixLayout.segment_size`. The channels that a smaller segment does not
fill are padding, behind each of its runs. :mod:`megatron_helix.exchange.padding` says why it is
zero and stays so.

Nothing here imports ``torch.distributed``: it is tested without processes. Bad layouts are refused
before torch is imported.
"""

from __future__ import annotations  # torch is imported when an index is asked for, not before

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from megatron_helix.basics.errors import UserError

if TYPE_CHECKING:
    import torch

PADDING = -1  # in an order of stored rows, the index of one that is no canonical row


class _Heads(NamedTuple):
    """What of a model a partition must fit."""

    heads: int
    groups: int
    channels: int
    rotary_dim: int
    interleaved: bool

    @property
    def segment_blocks(self) -> int:
        if self.rotary_dim == 0 or self.interleaved:
            return 1
        # Pairs are (k, k + rotary_dim / 2): with blocks of rotary_dim / 2 channels both of a pair
        # have the same place in their blocks.
        blocks = max(1, 2 * self.channels // self.rotary_dim)
        return blocks if self.channels % blocks == 0 else 1

    @property
    def together(self) -> int:
        """Neighbouring channels of a block that a segment has all of."""
        return 2 if self.rotary_dim and self.interleaved else 1

    @property
    def most_segments(self) -> int:
        """Segments of which each has some channels of every block."""
        return -(-self.channels // (self.segment_blocks * self.together))

    def runs(self, m: int) -> tuple[int, ...]:
        """Channels that each of m segments has of a block."""
        block, units = self.channels // self.segment_blocks, self.most_segments
        ends = [min(block, self.together * (j * units // m)) for j in range(m + 1)]
        return tuple(end - start for start, end in pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class HelixLayout:
    """How attention is cut over one tensor-parallel group.

    Args:
        m: segments of the head dimension (size of the dim axis).
        n: head groups (size of the head axis).
        num_attention_heads: query heads H of the whole model.
        num_query_groups: key/value groups K of the whole model; equal to H without GQA.
        kv_channels: head dimension d.
        rotary_dim: how many of the d channels rotary embeddings rotate; 0 without rotary.
        rotary_interleaved: whether rotation pairs are neighbours instead of ``rotary_dim / 2``
            apart.
        output_gate: whether every query head has a gate packed behind it in the QKV projection.

    Raises:
        UserError: when n does not divide K or H, K not H, or there are not m channels (with rotary
            embeddings, pairs) to cut.
    """

    m: int
    n: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        fault = _fault(self.m, self.n, self._model)
        if fault:
            raise UserError(f"{fault}; {_remedy(self.size, self._model)}")

    @property
    def size(self) -> int:
        """Ranks of the tensor-parallel group, T = m * n."""
        return self.m * self.n

    @property
    def segment_blocks(self) -> int:
        """Blocks of d of which a segment takes an equal part each, so that it holds whole pairs."""
        return self._model.segment_blocks

    @property
    def _model(self) -> _Heads:
        return _Heads(
            self.num_attention_heads,
            self.num_query_groups,
            self.kv_channels,
            self.rotary_dim,
            self.rotary_interleaved,
        )

    @property
    def segment_size(self) -> int:
        """Channels of one head that a rank stores: d / m, or those of the largest segment."""
        return self.segment_blocks * self.stored_run

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Neighbouring channels that each segment has of a block of d; alike where m cuts it."""
        return self._model.runs(self.m)

    @property
    def stored_run(self) -> int:
        """The length in which every run is stored, that of the longest."""
        return max(self.runs)

    @property
    def padded_channels(self) -> int:
        """Channels of a head in its m tiles together: d, and what pads smaller segments."""
        return self.m * self.segment_size

    @property
    def waste(self) -> float:
        """What padding adds to the attention weights, as a part of them; 0 where m divides d."""
        return self.padded_channels / self.kv_channels - 1

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head, H / K."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def slots(self) -> int:
        """Heads packed in one query group's rows: its queries, their gates, one key, one value."""
        return self.heads_per_group * (2 if self.output_gate else 1) + 2

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(head group i, segment j) of a rank of the tensor-parallel group."""
        if not 0 <= rank < self.size:
            raise UserError(f"rank: need 0 <= rank < m * n = {self.size}, got {rank}")
        return divmod(rank, self.m)

    def dim_group(self, rank: int) -> list[int]:
        """Ranks that own the same heads as ``rank``, in segment order; m of them."""
        i, _ = self.coordinates(rank)
        return [i * self.m + j for j in range(self.m)]

    def head_axis_group(self, rank: int) -> list[int]:
        """Ranks that own the same segment as ``rank``, in the order of head groups; n of them."""
        _, j = self.coordinates(rank)
        return [i * self.m + j for i in range(self.n)]

    @property
    def pairs_are_whole(self) -> bool:
        """Whether both channels of every rotation pair are in one segment, as ``scores`` needs."""
        return self.rotary_dim == 0 or all(
            _closed(self.segment_channels(j), self.rotary_dim, self.rotary_interleaved)
            for j in range(self.m)
        )

    def segment_channels(self, segment: int) -> torch.Tensor:
        """Channels of a head that make a segment, ``[d/m]``, ascending; without padding."""
        import torch

        start, length = sum(self.runs[:segment]), self.runs[segment]
        blocks = torch.arange(self.kv_channels).view(self.segment_blocks, -1)
        return blocks[:, start : start + length].reshape(-1)

    def qkv_rows(self) -> torch.Tensor:
        """Canonical row of every stored row of the QKV projection; :data:`PADDING` of padding.

        Stored rows are those of rank 0, of rank 1, ...: each its tile ``[K/n, slots, d/m]``.
        Canonical rows are Megatron's, ``[K, slots, d]``.
        """
        return self._tiles(self.num_query_groups * self.slots)

    def proj_columns(self) -> torch.Tensor:
        """Canonical column of every stored column of the output projection; padding likewise."""
        return self._tiles(self.num_attention_heads)

    def _tiles(self, heads: int) -> torch.Tensor:
        """Canonical indices ``[heads, d]`` reordered to ``[n, m, heads/n, d/m]``, flat."""
        import torch

        index = torch.arange(heads * self.kv_channels)
        index = index.view(self.n, heads // self.n, self.segment_blocks, -1)
        tiles = index.new_full((self.m, *index.shape[:-1], self.stored_run), PADDING)
        for tile, run in zip(tiles, index.split(self.runs, dim=-1), strict=True):
            tile[..., : run.size(-1)] = run
        return tiles.transpose(0, 1).reshape(-1)


def _closed(channels: torch.Tensor, rotary_dim: int, interleaved: bool) -> bool:
    rotated = channels[channels < rotary_dim]
    partners = rotated ^ 1 if interleaved else (rotated + rotary_dim // 2) % rotary_dim
    return set(partners.tolist()) == set(rotated.tolist())


def _fault(m: int, n: int, model: _Heads) -> str | None:
    """What keeps a model from being cut m x n; None if it can be."""
    for name, value, of_name, of_value in (
        ("--helix-n", n, "--num-attention-heads", model.heads),
        ("--helix-n", n, "--num-query-groups", model.groups),
        ("--num-query-groups", model.groups, "--num-attention-heads", model.heads),
    ):
        if fault := _indivisible(name, value, of_name, of_value):
            return fault
    most = model.most_segments
    if not 1 <= m <= most:
        units = "channels" if most == model.channels else "rotary pairs"
        return (
            f"--helix-m: must be from 1 to {most}, the {units} of a head of --kv-channels"
            f" {model.channels}, got {m}"
        )
    return None


def _cuts(size: int, model: _Heads) -> list[tuple[int, int]]:
    """Every (m, n) of ``size`` ranks that cuts a model, fewest segments first."""
    pairs = [(m, size // m) for m in range(1, size + 1) if size % m == 0]
    return [pair for pair in pairs if not _fault(*pair, model)]


def _remedy(size: int, model: _Heads) -> str:
    """What the user can do instead: a cut of as many ranks, or the degrees next to it."""
    if size > 0 and (cuts := _cuts(size, model)):
        return "use " + " or ".join(f"--helix-m {m} --helix-n {n}" for m, n in cuts)
    degrees = [*range(size - 1, 0, -1)], range(max(size, 0) + 1, 2 * max(size, 0) + 2)
    near = [next((t for t in side if _cuts(t, model)), None) for side in degrees]
    found = [f"{t} ({' x '.join(map(str, _cuts(t, model)[0]))})" for t in near if t]
    if not found:
        return "no m x n cuts this model"
    return f"no m x n = {size} cuts this model; degrees that do: {' and '.join(found)}"


def require_divides(
    name: str, value: int, of_name: str, of_value: int, *, remedy: str = "choose a divisor"
) -> None:
    """Raise the one error every divisibility rule of a layout gives.

    Raises:
        UserError: when ``value`` is not a positive divisor of ``of_value``.
    """
    if fault := _indivisible(name, value, of_name, of_value):
        raise UserError(f"{fault}; {remedy}")


def _indivisible(name: str, value: int, of_name: str, of_value: int) -> str | None:
    if value >= 1 and of_value % value == 0:
        return None
    return f"{name}: must be a positive divisor of {of_name} ({of_value}), got {value}"

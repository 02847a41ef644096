"""How the m shards of a dim group make the weight of a head group.

Sharded einsum (a weight ``[F, D]``, cut over head and dim axis; tokens over the dim axis)::

    W[F_mn, D]  -> W[F_n, D]      all-gather over dim, whenever the whole is needed
    dW[F_n, D]_m -> dW[F_mn, D]   all-to-all over dim of the parts, each from 1/m of the tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_helix.kernels.copies import joined, parted

FEW_RUNS = 2  # that many are sent one by one: a call more each, and nothing to put in order


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How the shards of a dim group make the weight of a head group.

    The cut axis of the head group's weight is ``[outer, m, inner]``; a shard is one index of the
    middle. Where the m are not alike, a shard has zeros behind the shorter ones, which the whole is
    without. Shards travel with that axis first: a shard that is cut by columns is transposed before
    it is sent, 1/m of the copying that the gathered weight would need, and what arrives is whole
    rows of the transposed weight, which a GEMM reads as they are. One that wants the rows of the
    weight itself has shards travel as they lie, and what arrives is put in order.

    The two halves of a gated MLP's weight are gathered one after the other, each to where it
    belongs; more runs than :data:`FEW_RUNS` are gathered together and put in order.

    Attributes:
        axis: the dimension of the weight that is cut: 0 for a column-parallel linear, 1 for row.
        outer: runs of a shard that lie apart in the whole: 1 for a contiguous shard, 2 for a gated
            MLP (gate and up), heads times blocks for attention's tiles.
        lengths: of the m inner axes; none where they are alike.
        as_they_lie: whether a shard that is cut by columns travels without being transposed.
    """

    axis: int
    outer: int = 1
    lengths: tuple[int, ...] = ()
    as_they_lie: bool = False

    @property
    def turns(self) -> bool:
        """Whether shards travel transposed."""
        return self.axis == 1 and not self.as_they_lie

    def runs(self, shard: torch.Tensor) -> Sequence[torch.Tensor]:
        """What of a shard travels together, views of it: ``[rows, ...]`` with the cut axis first.

        The shard ``[D, F/T]`` itself where the cut axis does not travel first.
        """
        if self.axis == 1:
            return [shard.t() if self.turns else shard]
        return shard.unflatten(0, (self._apart, -1)).unbind(0)

    def join(self, gathered: torch.Tensor, m: int) -> torch.Tensor:
        """``[apart, m, ...]``, each run's m shards -> the head group's weight.

        Contiguous, or the transposed view of what is; a copy of ``gathered`` only where its order
        is not that of the weight, or has padding in it.
        """
        if self.axis == 1 and not self.turns:
            columns = gathered[0].unflatten(-1, (self.outer, -1))  # [m, D, outer, inner]
            return joined(columns, self._lengths(m, columns.size(-1)), dim=2).flatten(1)
        inner = gathered.unflatten(2, (self.outer // self._apart, -1)).transpose(0, 1)
        whole = joined(inner, self._lengths(m, inner.size(3)), dim=2).flatten(0, 2)
        return whole.t() if self.turns else whole

    def parts(self, whole: torch.Tensor, m: int) -> Sequence[torch.Tensor]:
        """The head group's weight -> ``[m, ...]`` for every run of a shard; inverse of `join`.

        A copy only where `join` makes one; padding is zero.
        """
        if self.axis == 1 and not self.turns:
            columns = whole.unflatten(1, (self.outer, -1))  # [D, outer, m * inner]
            lengths = self._lengths(m, columns.size(2) // m)
            return [parted(columns, lengths, dim=2).flatten(2)]
        whole = whole.t() if self.turns else whole
        runs = whole.unflatten(0, (self._apart, self.outer // self._apart, -1))
        lengths = self._lengths(m, runs.size(2) // m)
        return [parted(run, lengths, dim=1).flatten(1, 2) for run in runs.unbind(0)]

    @property
    def alike(self) -> bool:
        """Whether the m shards are of one length, without padding."""
        return len({*self.lengths}) < 2

    @property
    def copies_features(self) -> bool:
        """Whether :meth:`features` are copies."""
        return self.outer > self._apart

    def features(self, of: torch.Tensor, m: int, dim: int) -> Sequence[Sequence[torch.Tensor]]:
        """A factor of the whole's gradient, cut as its features are, where shards are alike.

        Args:
            of: the features along ``dim``, in the whole's order, and along the other dimension
                tokens.
            m: number of shards.
            dim: 0 or 1.

        Returns:
            For each shard what belongs to each of :meth:`places`: views, or copies where runs lie
            apart that do not travel so.
        """
        cut = of.unflatten(dim, (self._apart, self.outer // self._apart, m, -1))
        return [
            [run.flatten(dim, dim + 1) for run in shard.unbind(dim)]
            for shard in cut.unbind(dim + 2)
        ]

    def places(self, shard: torch.Tensor) -> Sequence[torch.Tensor]:
        """Where :meth:`features` of a shard belong in it, views; contiguous."""
        return shard.unflatten(self.axis, (self._apart, -1)).unbind(self.axis)

    def _lengths(self, m: int, alike: int) -> Sequence[int]:
        return self.lengths or (alike,) * m

    @property
    def _apart(self) -> int:
        return self.outer if self.axis == 0 and self.outer <= FEW_RUNS else 1


def runs_beside_compute(shard: torch.Tensor) -> bool:
    """Whether a collective on ``shard`` is worth beginning before its result is needed."""
    return shard.device.type == "cuda"

"""Shards of a weight and the weight: what is gathered is the whole, and its parts are the shards'.

Without ranks: what each would send, stacked.
"""

import pytest
import torch

from megatron_helix.exchange.shards import Shards

D = 5
CUTS = [Shards(axis=0), Shards(axis=1), Shards(axis=1, as_they_lie=True)]


def _shard(whole: torch.Tensor, shards: Shards, lengths: tuple[int, ...], j: int) -> torch.Tensor:
    """Run after run, zeros behind those of a shorter one: the definition."""
    runs = []
    for block in whole.chunk(shards.outer, shards.axis):
        run = block.split(lengths, shards.axis)[j]
        shape = list(run.shape)
        shape[shards.axis] = max(lengths) - lengths[j]
        runs += [run, run.new_zeros(shape)]
    return torch.cat(runs, shards.axis)


@pytest.mark.parametrize("lengths", [(2, 2, 2), (1, 3, 2), (4,)])
@pytest.mark.parametrize("outer", [1, 2, 6])
@pytest.mark.parametrize("cut", CUTS, ids=["rows", "columns", "columns as they lie"])
def test_the_whole_is_joined_of_its_shards(
    cut: Shards, outer: int, lengths: tuple[int, ...]
) -> None:
    m, alike = len(lengths), len(set(lengths)) == 1
    shapes = [(outer * sum(lengths), D)[:: -1 if cut.axis else 1]]
    shapes += [(outer * sum(lengths),)] * (cut.axis == 0)  # a bias
    for given in ((), lengths) if alike else (lengths,):
        shards = Shards(axis=cut.axis, outer=outer, lengths=given, as_they_lie=cut.as_they_lie)
        for shape in shapes:
            whole = torch.randn(shape)
            sent = [shards.runs(_shard(whole, shards, lengths, j)) for j in range(m)]
            gathered = torch.stack([torch.stack(run) for run in zip(*sent, strict=True)])
            joined, parts = shards.join(gathered, m), shards.parts(whole, m)
            assert torch.equal(joined, whole)
            assert (joined.t() if shards.turns else joined).is_contiguous()
            assert len(parts) == len(gathered)
            for part, run in zip(parts, gathered, strict=True):
                assert part.is_contiguous()
                assert torch.equal(part, run)


@pytest.mark.parametrize("cut", [Shards(axis=0), Shards(axis=0, outer=2), Shards(axis=1)], ids=str)
def test_what_lies_in_order_is_not_copied(cut: Shards) -> None:
    m, rows = 3, 4
    apart = cut.outer
    gathered = torch.randn(apart, m, rows, D)
    joined = cut.join(gathered, m)
    assert joined.data_ptr() == gathered.data_ptr()
    for part, run in zip(cut.parts(joined, m), gathered, strict=True):
        assert part.data_ptr() == run.data_ptr()

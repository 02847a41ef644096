"""The calls of a rank whose keys lie between its own tokens: every pair once, and no other."""

from collections import Counter
from itertools import pairwise

import torch
from hypothesis import given

from megatron_helix.exchange.dealing import joined
from megatron_helix.exchange.gaps import gap_sights, gaps_of, own_sights
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.tokens import runs_of
from megatron_helix.kernels.gap_attention import Gaps
from tests.exchange.test_dealing import rows
from tests.exchange.test_tokens import layout_of

CPU = torch.device("cpu")


def _keys(gaps: Gaps, layout_ranks: int, share: int) -> list[tuple[int, int]]:
    """(rank, row) of the keys that blocks name."""
    rank = torch.arange(layout_ranks)[:, None, None].expand(-1, 2, share)
    row = torch.arange(share).expand(layout_ranks, 2, share)
    (ranks, _), (found, _) = gaps.places.of(rank), gaps.places.of(row)
    return list(zip(ranks.tolist(), found.tolist(), strict=True))


@given(rows())
def test_every_causal_pair_of_a_document_is_attended_to_once(
    row: tuple[int, int, tuple[int, ...]],
) -> None:
    m, n, ends = row
    layout, tokens = layout_of(m, n), ends[-1]
    for balanced in (True, False):
        plan = Plan(exchange="weights", split="sequence", balanced=balanced, documents=ends)
        of_rank = [
            [p for run in runs_of(plan, layout, j, tokens) for p in range(run.start, run.end)]
            for j in range(m)
        ]
        for segment, mine in enumerate(of_rank):
            gaps = gaps_of(plan, layout, segment, tokens, CPU)
            if n == 1 and balanced:
                assert len(gaps.others) <= (1 if m == 2 else 2)
            theirs = [of_rank[rank][at] for rank, at in _keys(gaps, m, tokens // m)]
            found: Counter[tuple[int, int]] = Counter()
            for block in (gaps.own, *gaps.others):
                keys = mine if block.causal else theirs
                packed = block.packed
                assert packed is not None
                assert packed.first_query[-1] == len(mine)
                assert packed.first_key[-1] == len(keys)
                seen = torch.zeros(len(mine), dtype=torch.bool)
                spans = zip(
                    packed.first_query[:-1].tolist(),
                    packed.queries.diff().tolist(),
                    packed.first_key[:-1].tolist(),
                    packed.keys.diff().tolist(),
                    strict=True,
                )
                for first, length, key, number in spans:
                    seen[first : first + length] = True
                    for i in range(length):
                        last = i + 1 if block.causal else number
                        found.update((mine[first + i], k) for k in keys[key : key + last])
                assert packed.seen is None or torch.equal(packed.seen, seen)
                assert packed.seen is not None or seen.all()
            begins = [max(end for end in ends if end <= position) for position in mine]
            expected = Counter(
                (position, key)
                for position, begin in zip(mine, begins, strict=True)
                for key in range(begin, position + 1)
            )
            assert found == expected


def test_calls_of_rows_that_are_not_packed_are_slices() -> None:
    """Of two ranks with pieces 0 and 3, 1 and 2: the late one sees two, both see the first."""
    plan = Plan(exchange="weights", split="sequence")
    first, second = (gaps_of(plan, layout_of(2, 1), j, 16, CPU) for j in range(2))
    assert first.own == second.own
    assert first.own.packed is None
    ((rows, keys),) = ((block.rows, block.keys) for block in first.others)
    assert (rows, keys) == (slice(4, 8), slice(0, 8))
    ((rows, keys),) = ((block.rows, block.keys) for block in second.others)
    assert (rows, keys) == (slice(0, 8), slice(0, 4))


def test_no_more_is_computed_than_causal_attention_has() -> None:
    for m, n in ((2, 1), (2, 2), (3, 1), (4, 2), (8, 1)):
        layout, tokens = layout_of(m, n), 16 * m * n
        plan = Plan(exchange="weights", split="sequence")
        computed = []
        for segment in range(m):
            runs = joined(runs_of(plan, layout, segment, tokens))
            (own,) = own_sights(runs)
            seen = [sight for call in gap_sights(runs) for sight in call]
            assert all(a.key + a.keys <= b.key for a, b in pairwise(seen))
            computed.append(
                own.rows * (own.rows + 1) // 2 + sum(one.rows * one.keys for one in seen)
            )
        assert sum(computed) == tokens * (tokens + 1) // 2

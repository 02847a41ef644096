"""The partition's arithmetic: permutations, tiles, rotary pairs, and every refusal."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix.partition import tiles
from megatron_helix.partition.layout import PADDING, HelixLayout

MHA = {"m": 2, "n": 2, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16}


@st.composite
def layouts(draw: st.DrawFn) -> HelixLayout:
    """Layouts that fit by construction; m need not divide the head dimension."""
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = n * draw(st.integers(1, 3))
    # Rotary dimensions that are 1, 1/2 or 1/4 of a head, or nothing. Eight channels a segment and
    # more make all of them, and interleaved pairs, fit.
    kv_channels = 8 * draw(st.integers(m, 3 * m))
    rotary_dim = draw(st.sampled_from([0, kv_channels // 4, kv_channels // 2, kv_channels]))
    return HelixLayout(
        m=m,
        n=n,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=kv_channels,
        rotary_dim=rotary_dim,
        rotary_interleaved=draw(st.booleans()),
        output_gate=draw(st.booleans()),
    )


def tiles_by_rank(order: torch.Tensor, layout: HelixLayout) -> list[torch.Tensor]:
    """The canonical indices each rank stores."""
    return list(order.chunk(layout.size))


def channels_of(layout: HelixLayout, segment: int) -> set[int]:
    """Channels of a head that belong to a segment, read off rank ``segment``'s projection tile."""
    columns = tiles_by_rank(layout.proj_columns(), layout)[segment]
    return set((columns[columns != PADDING] % layout.kv_channels).tolist())


def rotary_pairs(layout: HelixLayout) -> list[tuple[int, int]]:
    """Channels that a rotary embedding mixes, as Megatron's ``_rotate_half`` pairs them."""
    half = layout.rotary_dim // 2
    if layout.rotary_interleaved:
        return [(2 * k, 2 * k + 1) for k in range(half)]
    return [(k, k + half) for k in range(half)]


def pairs_are_whole(layout: HelixLayout) -> bool:
    """Whether every pair lies in one segment, by looking at every pair."""
    segments = [channels_of(layout, j) for j in range(layout.m)]
    return all(any(set(pair) <= segment for segment in segments) for pair in rotary_pairs(layout))


@given(layouts())
def test_stored_order_is_a_permutation_of_the_canonical_one_and_padding(
    layout: HelixLayout,
) -> None:
    for order, heads in (
        (layout.qkv_rows(), layout.num_query_groups * layout.slots),
        (layout.proj_columns(), layout.num_attention_heads),
    ):
        real = order[order != PADDING]
        assert torch.equal(real.sort().values, torch.arange(heads * layout.kv_channels))
        assert len(order) == heads * layout.padded_channels
        assert len(order) / len(real) == pytest.approx(1 + layout.waste)
        assert (len(order) == len(real)) == (len(set(layout.runs)) == 1)


@given(layouts())
def test_a_weight_comes_back_from_its_tiles(layout: HelixLayout) -> None:
    whole = torch.rand(3, layout.num_attention_heads * layout.kv_channels)
    stored = tiles.stored(whole, layout.proj_columns(), axis=1)
    assert torch.equal(tiles.canonical(stored, layout.proj_columns(), axis=1), whole)
    assert stored.count_nonzero() == whole.count_nonzero()  # what is padded is zero


@given(layouts())
def test_segments_are_as_alike_as_whole_pairs_can_be(layout: HelixLayout) -> None:
    step = 2 if layout.rotary_dim and layout.rotary_interleaved else 1
    assert max(layout.runs) - min(layout.runs) in (0, step)
    assert layout.segment_size == layout.segment_blocks * max(layout.runs)


@given(layouts())
def test_segments_of_equal_size_are_a_transposition(layout: HelixLayout) -> None:
    if layout.waste:
        return
    shape = (layout.num_attention_heads // layout.n, layout.segment_blocks, layout.m, -1)
    whole = torch.arange(layout.num_attention_heads * layout.kv_channels)
    tiles = whole.view(layout.n, *shape).permute(0, 3, 1, 2, 4)
    assert torch.equal(layout.proj_columns(), tiles.reshape(-1))


@given(layouts())
def test_a_tile_holds_one_segment_of_every_head_of_one_head_group(layout: HelixLayout) -> None:
    d = layout.kv_channels
    packed = layout.num_query_groups * layout.slots  # heads of all kinds in the QKV rows
    for order, heads in (
        (layout.qkv_rows(), packed),
        (layout.proj_columns(), layout.num_attention_heads),
    ):
        for rank, tile in enumerate(tiles_by_rank(order, layout)):
            i, j = layout.coordinates(rank)
            per_group = heads // layout.n
            runs = tile.view(per_group, layout.segment_blocks, -1)
            assert (runs[..., layout.runs[j] :] == PADDING).all()  # behind every run
            real = runs[..., : layout.runs[j]].reshape(per_group, -1)
            held = torch.stack([real // d, real % d])
            expected = torch.arange(i * per_group, (i + 1) * per_group)
            assert (held[0] == expected[:, None]).all()  # whole heads, in order
            assert (held[1] == held[1][:1]).all()  # the same channels of every head
            assert set(held[1][0].tolist()) == channels_of(layout, j)


@given(layouts())
def test_segments_are_the_same_in_every_head_group_and_cover_the_head(layout: HelixLayout) -> None:
    segments = [channels_of(layout, j) for j in range(layout.m)]
    assert set().union(*segments) == set(range(layout.kv_channels))
    assert sum(map(len, segments)) == layout.kv_channels


@given(layouts())
def test_segment_channels_are_those_of_the_tiles(layout: HelixLayout) -> None:
    for j in range(layout.m):
        assert layout.segment_channels(j).tolist() == sorted(channels_of(layout, j))


@given(layouts())
def test_rotary_pairs_stay_within_a_segment(layout: HelixLayout) -> None:
    assert pairs_are_whole(layout)
    assert layout.pairs_are_whole


# Of these, 3/4 and 7/8 of a head put pairs a distance apart that does not divide the head.
@given(st.integers(2, 4), st.sampled_from([1, 2, 4, 6, 7, 8]))
def test_a_layout_knows_whether_its_rotary_pairs_are_whole(m: int, eighths: int) -> None:
    kv_channels = 16 * m
    layout = HelixLayout(
        **{**MHA, "m": m, "kv_channels": kv_channels}, rotary_dim=kv_channels * eighths // 8
    )
    assert layout.pairs_are_whole == pairs_are_whole(layout)


@given(layouts())
def test_ranks_coordinates_and_groups_agree(layout: HelixLayout) -> None:
    seen = [layout.coordinates(rank) for rank in range(layout.size)]
    assert seen == [(i, j) for i in range(layout.n) for j in range(layout.m)]  # dim axis is fast
    for rank, (i, j) in enumerate(seen):
        assert [layout.coordinates(r) for r in layout.dim_group(rank)] == [
            (i, other) for other in range(layout.m)
        ]
        assert [layout.coordinates(r) for r in layout.head_axis_group(rank)] == [
            (other, j) for other in range(layout.n)
        ]


def test_one_segment_is_megatrons_own_order() -> None:
    layout = HelixLayout(**{**MHA, "m": 1, "n": 4}, rotary_dim=16)
    assert torch.equal(layout.qkv_rows(), torch.arange(4 * 3 * 16))
    assert torch.equal(layout.proj_columns(), torch.arange(4 * 16))


@pytest.mark.parametrize(("gate", "slots"), [(False, 2 + 2), (True, 2 * 2 + 2)])
def test_slots_are_queries_gates_key_and_value_of_a_group(gate: bool, slots: int) -> None:
    layout = HelixLayout(**{**MHA, "num_query_groups": 2}, output_gate=gate)
    assert layout.slots == slots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n": 3},
            r"^--helix-n: must be a positive divisor of --num-attention-heads \(4\), got 3;",
        ),
        (
            {"n": 4, "num_query_groups": 2},
            r"^--helix-n: must be a positive divisor of --num-query-groups \(2\), got 4; use"
            r" --helix-m 4 --helix-n 2 or --helix-m 8 --helix-n 1$",
        ),
        (
            {"m": 17, "n": 1},
            r"^--helix-m: must be from 1 to 16, the channels of a head of --kv-channels 16, got 17;"
            r" no m x n = 17 cuts this model; degrees that do: 16 \(4 x 4\) and 18 \(9 x 2\)$",
        ),
        (
            {"m": 16, "rotary_dim": 16},
            r"^--helix-m: must be from 1 to 8, the rotary pairs of a head of --kv-channels 16, got"
            r" 16; use --helix-m 8 --helix-n 4$",
        ),
        (
            {"m": 8, "rotary_dim": 8},  # half a head rotated: pairs are a quarter head apart
            r"^--helix-m: must be from 1 to 4, the rotary pairs .*; use --helix-m 4 --helix-n 4$",
        ),
        (
            {"m": 16, "rotary_dim": 16, "rotary_interleaved": True},
            r"^--helix-m: must be from 1 to 8, the rotary pairs .*; use --helix-m 8 --helix-n 4$",
        ),
        (
            {"n": 2, "num_attention_heads": 6, "num_query_groups": 4},
            r"^--num-query-groups: must be a positive divisor of --num-attention-heads \(6\), got"
            r" 4; no m x n cuts this model$",
        ),
        ({"m": 0}, r"^--helix-m: must be from 1 to 16, .*, got 0;"),
        ({"n": -2}, r"^--helix-n: must be a positive divisor of .*, got -2;"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HelixLayout(**{**MHA, **change})


@pytest.mark.parametrize("rank", [-1, 4])
@pytest.mark.parametrize("question", ["coordinates", "dim_group", "head_axis_group"])
def test_a_rank_outside_the_group_is_refused(question: str, rank: int) -> None:
    layout = HelixLayout(**MHA)
    with pytest.raises(ValueError, match=rf"^rank: need 0 <= rank < m \* n = 4, got {rank}$"):
        getattr(layout, question)(rank)


def test_a_layout_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HelixLayout(**MHA).m = 4  # pyright: ignore[reportAttributeAccessIssue]

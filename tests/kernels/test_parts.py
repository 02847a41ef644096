"""What is computed at once: every head of every piece in one part, a GPU filled, memory."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels import parts
from megatron_helix.kernels.parts import Heads, Part
from megatron_helix.kernels.prefix_attention import PrefixAttention
from megatron_helix.kernels.query_pieces import Sight, computed, cut
from tests.core_attention_case import B, D, H, build, one_rank, tensors
from tests.live_bytes import LiveBytes

CAUSAL = Sight(left=None, right=0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What core attentions ask Megatron for."""
    with one_rank():
        yield


def elements(part: Part, heads: Heads) -> int:
    """Matrices of a part."""
    return len(range(heads.sequences)[part.sequences]) * len(range(heads.groups)[part.groups])


@given(
    sequences=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 3, 8]),
    shared=st.integers(1, 3),
    scores=st.integers(1, 4000),
    filling=st.integers(1, 4000),
)
def test_every_head_of_every_piece_is_in_one_part(
    sequences: int, groups: int, shared: int, scores: int, filling: int
) -> None:
    pieces = cut([(0, 32)], 32, CAUSAL, least=8)
    heads = Heads(sequences, groups * shared, groups, 4)
    found = parts.divide(pieces, heads, scores=scores, filling=filling)
    matrices = [
        (part.piece, sequence, group)
        for part in found
        for sequence in range(sequences)[part.sequences]
        for group in range(groups)[part.groups]
    ]
    assert len(matrices) == len(set(matrices)) == len(pieces) * sequences * groups
    assert [part.piece for part in found] == sorted((p.piece for p in found), reverse=True)
    for part in found:  # a view of keys is one batch of matrices
        assert part.groups == slice(0, groups) or part.sequences.stop - part.sequences.start == 1


@pytest.mark.parametrize(
    ("sequences", "length", "most"),
    [(8, 2048, 2**26), (1, 8192, 2**27), (1, 16384, 2**28), (1, 2048, 2**24)],
)
def test_parts_are_as_small_as_fill_a_gpu(sequences: int, length: int, most: int) -> None:
    heads, pieces = Heads(sequences, 16, 16, 512), cut([(0, length)], length, CAUSAL)
    found = parts.divide(pieces, heads)
    assert parts.largest(found, heads) == most
    whole = sequences * 16 * pieces[-1].length * 512
    for part in found:
        own = elements(part, heads) * part.piece.length * 512
        assert own >= min(parts.FILLING, whole)


@pytest.mark.parametrize("channels", [D, 2])
def test_memory_is_that_of_the_gradients_what_is_kept_and_one_part(channels: int) -> None:
    """Without kept probabilities they are a second tensor of the size of a part's scores."""
    core = build(PrefixAttention, AttnMaskType.causal, kv_channels=channels)
    core.least, core.scores, core.filling = 16, 4 * 16 * 64, 1  # a sequence at a time
    query, key, value = (x.requires_grad_() for x in tensors(64, 64, H, channels))
    grad = torch.randn(64, B, H * channels, dtype=torch.float64)
    counted = LiveBytes()
    with counted:
        torch.autograd.grad(core(query, key, value, None), (query, key, value), grad)
    kept = B * H * computed(cut([(0, 64)], 64, CAUSAL, least=16))
    keeps = kept <= core.kept * 3 * query.numel()
    assert keeps == (channels == D)
    expected = 4 * query.numel() + (kept + core.scores if keeps else 2 * core.scores)
    masks = 16 * 16 * (2 * 8 + 3)  # of positions, on the diagonal
    assert 8 * expected <= counted.peak <= 8 * expected + masks


@pytest.mark.parametrize("rotated", [True, False])
def test_packed_queries_keys_and_values_are_kept_where_all_of_them_are_views(rotated: bool) -> None:
    core = build(PrefixAttention, AttnMaskType.causal)
    packed = torch.randn(8, B, H, 3 * D, dtype=torch.float64, requires_grad=True)
    query, key, value = (packed * 1).split(D, dim=-1)
    if rotated:
        query, key = query * 1, key * 1
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.add(x.untyped_storage().nbytes()) or x, lambda x: x
    ):
        core(query, key, value, None)
    assert (packed.nbytes in kept) != rotated

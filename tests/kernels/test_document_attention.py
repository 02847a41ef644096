"""Core attention of packed documents against scores of the whole row, block-diagonally masked."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels import document_attention
from megatron_helix.kernels.document_attention import DocumentAttention
from tests.kernels.test_flex_attention import D, H, alone, build, tensors  # noqa: F401  # a fixture


def ends(lengths: list[int]) -> torch.Tensor:
    """``cu_seqlens`` of documents."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(
    queries: list[int], keys: list[int], rooms: tuple[list[int], list[int]] | None = None
) -> PackedSeqParams:
    """Documents of so many queries and keys, in rooms of those sizes."""
    padded = {}
    if rooms:
        padded = {"cu_seqlens_q_padded": ends(rooms[0]), "cu_seqlens_kv_padded": ends(rooms[1])}
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends(queries), cu_seqlens_kv=ends(keys), **padded
    )


def row(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any tensor with a gradient."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def unfused(
    core: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[list[int], list[int]],
    rooms: tuple[list[int], list[int]],
    window: tuple[int, int],
) -> torch.Tensor:
    """All scores of the row: only those of a document's own keys, in the window, are kept."""
    left, right = window
    visible = torch.zeros(len(query), len(key), dtype=torch.bool)
    starts = [list(accumulate([0, *room]))[:-1] for room in rooms]
    for q0, k0, nq, nk in zip(*starts, *lengths, strict=True):
        distance = torch.arange(nk)[None] - torch.arange(nk - nq, nk)[:, None]
        seen = torch.ones(nq, nk, dtype=torch.bool)
        seen &= (distance <= right) if right >= 0 else True
        seen &= (distance >= -left) if left >= 0 else True
        visible[q0 : q0 + nq, k0 : k0 + nk] = seen
    shared = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scale = core.softmax_scale * (core.scale_mask_softmax.scale or 1.0)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    offset = core.softmax_offset
    offset = torch.tensor([-1e30] * query.size(1)) if offset is None else offset
    sinks = offset.double()[:, None, None].expand(-1, len(query), 1)
    weights = torch.cat([scores, sinks], dim=2).softmax(dim=2)[..., :-1]
    weights = weights * visible.any(1)[:, None]
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


EQUAL, UNEQUAL, ONES = [5, 5, 5], [1, 13, 2, 1], [1] * 6
CASES: dict[str, dict[str, Any]] = {
    "equal": {"queries": EQUAL},
    "unequal": {"queries": UNEQUAL},
    "one token": {"queries": ONES},
    "one document": {"queries": [12]},
    "full": {"queries": UNEQUAL, "mask_type": AttnMaskType.no_mask, "sees": (-1, -1)},
    "full padding": {"queries": UNEQUAL, "mask_type": AttnMaskType.padding, "sees": (-1, -1)},
    "prefixes": {"queries": [2, 3, 1], "keys": [9, 3, 4]},
    "grouped queries": {"queries": UNEQUAL, "num_query_groups": 2},
    "one query group": {"queries": [2, 3], "keys": [4, 7], "num_query_groups": 1},
    "window": {"queries": UNEQUAL, "window_size": (3, 0), "sees": (3, 0)},
    "window, prefixes": {
        **{"queries": [2, 5, 1], "keys": [9, 6, 4]},
        **{"window_size": (3, 0), "sees": (3, 0)},
    },
    "window to both sides": {"queries": [9], "window_size": (2, 1), "sees": (2, 1)},
    "sinks": {"queries": UNEQUAL, "softmax_type": "learnable"},
    "sinks, prefixes": {
        **{"queries": [2, 3, 1], "keys": [9, 3, 4]},
        **{"softmax_type": "learnable", "num_query_groups": 2},
    },
    "sinks, window": {
        **{"queries": [2, 7], "keys": [9, 7], "softmax_type": "learnable"},
        **{"window_size": (3, 0), "sees": (3, 0)},
    },
    "off by one": {"queries": EQUAL, "softmax_type": "off-by-one"},
    "padded": {"queries": [3, 1, 4], "rooms": ([4, 1, 6], [4, 1, 6])},
    "padded, prefixes": {
        **{"queries": [2, 1], "keys": [4, 3]},
        **{"rooms": ([3, 4], [4, 5])},
    },
    "scale": {"queries": UNEQUAL, "softmax_scale": 0.3},
    "scaling by layer": {"queries": UNEQUAL, "apply_query_key_layer_scaling": True},
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("case", CASES)
def test_documents_are_apart(case: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "_BLOCK", block)
    options = dict(CASES[case])
    queries = options.pop("queries")
    keys = options.pop("keys", queries)
    rooms = options.pop("rooms", None)
    mask_type = options.pop("mask_type", AttnMaskType.causal)
    window = options.pop("sees", (-1, 0))
    core = build(DocumentAttention, mask_type, **{"attention_softmax_in_fp32": False, **options})
    if core.softmax_offset is not None:
        core.softmax_offset = torch.nn.Parameter(torch.linspace(-1, 1, H))
    groups = core.num_query_groups_per_partition
    spare = 2 if rooms else 0  # a row may be longer than its documents' rooms
    of_query = sum(rooms[0] if rooms else queries) + spare
    of_key = sum(rooms[1] if rooms else keys) + spare
    query, key, value = row((of_query, H, D), 1), row((of_key, groups, D), 2), None
    value = row((of_key, groups, D), 3)
    inputs = [query, key, value]
    if core.softmax_offset is not None:
        inputs.append(core.softmax_offset)
    context = core(
        query, key, value, None, mask_type, packed_seq_params=packed(queries, keys, rooms)
    )
    lengths = (queries, keys)
    expected = unfused(core, query, key, value, lengths, rooms or lengths, window)
    torch.testing.assert_close(context, expected)
    back = row((of_query, H * D), 4).detach()
    found = torch.autograd.grad(context, inputs, back)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, inputs, back), strict=True):
        torch.testing.assert_close(gradient, wanted, check_dtype=False)


@pytest.mark.usefixtures("alone")
def test_rows_that_are_not_packed_are_megatrons() -> None:
    inputs = tensors(12, 12, H)
    ours, stock = (
        build(cls, AttnMaskType.causal)(*inputs, None)
        for cls in (DocumentAttention, DotProductAttention)
    )
    assert torch.equal(ours, stock)


@pytest.mark.usefixtures("alone")
def test_no_mask_is_the_square_of_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs["attn_mask"]
        shapes.append(None if mask is None else tuple(mask.shape))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    lengths = [1500, 700]
    core = build(DocumentAttention, AttnMaskType.causal, attention_softmax_in_fp32=False)
    tokens = sum(lengths)
    core(
        *(row((tokens, H, D), i) for i in range(3)),
        None,
        packed_seq_params=packed(lengths, lengths),
    )
    assert shapes == [None, None]
    core.scale_mask_softmax.window_size = (100, 0)
    shapes.clear()
    core(
        *(row((tokens, H, D), i) for i in range(3)),
        None,
        packed_seq_params=packed(lengths, lengths),
    )
    assert max(rows * keys for rows, keys in shapes) <= 256 * (256 + 100)
    assert sum(rows for rows, _ in shapes) == sum(
        b - a for a, b in pairwise(ends(lengths).tolist())
    )

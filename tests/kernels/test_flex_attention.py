"""FlexAttention against stock ``DotProductAttention``: the same module, the same numbers.

Forward only: torch has no backward pass of it on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels.flex_attention import FlexAttention
from tests.core_attention_case import B, D, H, build, hidden, one_rank, tensors

S = 12


@pytest.fixture
def alone() -> Iterator[None]:
    """What stock attention asks for."""
    with one_rank():
        yield


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"mask_type": AttnMaskType.no_mask},
    "grouped queries": {"num_query_groups": 2},
    "one query group": {"num_query_groups": 1},
    "a mask for each sequence": {"mask": B, "mask_type": AttnMaskType.padding},
    "a mask for all sequences": {"mask": 1, "mask_type": AttnMaskType.padding},
    "one query": {"queries": 1},
    "sliding window": {"window_size": (3, 0)},
    "sliding window, fewer queries": {"window_size": (3, 0), "queries": 4},
    "scaling by layer": {
        "apply_query_key_layer_scaling": True,
    },
    "off-by-one softmax": {"softmax_type": "off-by-one"},
    "learnable offset": {"softmax_type": "learnable", "num_query_groups": 2},
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_flex_is_stock(case: dict[str, Any]) -> None:
    options = dict(case)
    queries, masks = options.pop("queries", S), options.pop("mask", 0)
    mask_type = options.pop("mask_type", AttnMaskType.causal)
    stock, flex = build(DotProductAttention, mask_type, **options), None
    flex = build(FlexAttention, mask_type, **options)
    if options.get("softmax_type") == "learnable":
        flex.load_state_dict(stock.state_dict())
        assert stock.softmax_offset.abs().sum() > 0
    inputs = tensors(queries, S, options.get("num_query_groups", H))
    mask = hidden(masks, queries, S) if masks else None
    expected = stock(*inputs, mask, attn_mask_type=mask_type)
    actual = flex(*inputs, mask, attn_mask_type=mask_type)
    assert actual.shape == expected.shape == (queries, B, H * D)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_a_chunk_sees_its_prefix() -> None:
    """Bottom-right causal, which a sequence split asks for: the last rows of the whole."""
    flex = build(FlexAttention, AttnMaskType.causal)
    query, key, value = tensors(S, S, H)
    whole = flex(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    kind = AttnMaskType.causal_bottom_right
    chunk = flex(query[4:8], key[:8], value[:8], None, attn_mask_type=kind)
    torch.testing.assert_close(chunk, whole[4:8])


@pytest.mark.usefixtures("alone")
def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--attention-dropout: must be 0 .* got 0.1; set it"):
        build(FlexAttention, AttnMaskType.causal, attention_dropout=0.1)


@pytest.mark.usefixtures("alone")
def test_packed_sequences_and_biases_are_refused() -> None:
    flex = build(FlexAttention, AttnMaskType.causal)
    with pytest.raises(ValueError, match=r"^--helix-core-attention: flex takes neither packed"):
        flex(*tensors(S, S, H), None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match=r"^--helix-core-attention: flex takes neither packed"):
        flex(*tensors(S, S, H), None, packed_seq_params=object())


@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_an_offset_rounds_no_more_than_stock() -> None:
    """In half precision, against stock in double; the formula has two roundings, as stock's.

    Over some draws of the offset: of one, the two round to either side by a tenth and more.
    """
    options = {"softmax_type": "learnable"}
    half = {**options, "params_dtype": torch.bfloat16}
    inputs = [x.bfloat16() for x in tensors(S, S, H)]
    errors: dict[str, float] = {"flex": 0.0, "stock": 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        stock = build(DotProductAttention, AttnMaskType.causal, **half)
        flex = build(FlexAttention, AttnMaskType.causal, **half)
        exact = build(DotProductAttention, AttnMaskType.causal, **options)
        for core in (flex, exact):
            core.load_state_dict(stock.state_dict())
        expected = exact(*(x.double() for x in inputs), None, attn_mask_type=AttnMaskType.causal)
        for name, core in (("flex", flex), ("stock", stock)):
            found = core(*inputs, None, attn_mask_type=AttnMaskType.causal)
            assert found.dtype == torch.bfloat16
            errors[name] += float((found.double() - expected).norm() / expected.norm())
    assert 0 < errors["flex"] <= 1.1 * errors["stock"]

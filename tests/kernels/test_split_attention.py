"""``SplitAttention`` against stock ``DotProductAttention``: outputs and every gradient."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels.fused_kernels import ByCuDNN, ByFlash
from megatron_helix.kernels.merged_attention import joined
from megatron_helix.kernels.split_attention import SplitAttention
from tests.core_attention_case import B, D, H, build, gradients, hidden, one_rank, tensors

S = 40
CAUSAL = AttnMaskType.causal
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"mask_type": AttnMaskType.no_mask},
    "grouped queries": {"num_query_groups": 2},
    "one query group": {"num_query_groups": 1},
    "one query": {"queries": 1},
    "fewer queries": {"queries": 24, "num_query_groups": 2},
    "scaling by layer": {"apply_query_key_layer_scaling": True},
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What stock attention asks for."""
    with one_rank():
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_split_is_stock(case: dict[str, Any]) -> None:
    options = dict(case)
    queries, mask_type = options.pop("queries", S), options.pop("mask_type", CAUSAL)
    inputs = tensors(queries, S, options.get("num_query_groups", H))
    # Stock aligns a causal mask of its own to the first key.
    mask = torch.ones(queries, S, dtype=torch.bool).triu(S - queries + 1)[None, None]
    known = (mask, AttnMaskType.padding) if mask_type is CAUSAL else (None, mask_type)
    stock = build(DotProductAttention, known[1], **options)
    expected = gradients(stock, inputs, known[0], attn_mask_type=known[1])
    split = build(SplitAttention, mask_type, **options)
    for name, one in gradients(split, inputs, None, attn_mask_type=mask_type).items():
        torch.testing.assert_close(one, expected[name])


@pytest.mark.parametrize("groups", [H, 2])
def test_runs_of_queries_have_the_rows_of_the_whole(groups: int) -> None:
    """As a sequence split deals them: output and query gradient by rows, the others as sums."""
    core = build(SplitAttention, CAUSAL, num_query_groups=groups)
    query, *rest = tensors(S, S, groups)
    whole = gradients(core, [query, *rest], None)
    dealt = [[(0, 8), (24, 16)], [(8, 8), (16, 8)]]
    grad = torch.randn(whole["output"].shape, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (query, *rest)]
    expected = torch.autograd.grad(core(*leaves, None), leaves, grad)
    found = [torch.zeros_like(x) for x in leaves]
    for runs in dealt:
        rows = torch.cat([torch.arange(first, first + length) for first, length in runs])
        output = core(leaves[0][rows], *leaves[1:], None, runs=runs)
        torch.testing.assert_close(output, whole["output"][rows])
        for total, one in zip(found, torch.autograd.grad(output, leaves, grad[rows]), strict=True):
            total += one
    for total, one in zip(found, expected, strict=True):
        torch.testing.assert_close(total, one)


def test_half_precision_is_as_near_as_stock() -> None:
    inputs = [x.bfloat16() for x in tensors(24, S, 2)]
    options = {"num_query_groups": 2}
    mask = torch.ones(24, S, dtype=torch.bool).triu(S - 24 + 1)[None, None]
    half = {**options, "params_dtype": torch.bfloat16, "bf16": True}
    stock = {"attn_mask_type": AttnMaskType.padding}
    exact = gradients(
        build(DotProductAttention, AttnMaskType.padding, **options),
        [x.double() for x in inputs],
        mask,
        **stock,
    )
    near = gradients(
        build(DotProductAttention, AttnMaskType.padding, **half), inputs, mask, **stock
    )
    found = gradients(build(SplitAttention, CAUSAL, **half), inputs, None)
    for name, one in exact.items():
        ours, theirs = ((x[name].double() - one).norm() / one.norm() for x in (found, near))
        assert ours <= 1.35 * theirs, name


def test_logits_as_large_as_they_come_are_merged() -> None:
    """A past that has all of the weight, or none of it."""
    core = build(SplitAttention, CAUSAL)
    stock = build(DotProductAttention, AttnMaskType.padding)
    query, key, value = tensors(20, S, H)
    mask = torch.ones(20, S, dtype=torch.bool).triu(S - 20 + 1)[None, None]
    for factor in (1e3, -1e3):
        inputs = [query, torch.cat([factor * query.sum(0, keepdim=True), key[1:]]), value]
        expected = gradients(stock, inputs, mask, attn_mask_type=AttnMaskType.padding)
        for name, one in gradients(core, inputs, None).items():
            torch.testing.assert_close(one, expected[name])


@pytest.mark.parametrize("kernel", [ByCuDNN, ByFlash])
@pytest.mark.parametrize("causal", [True, False])
def test_the_operators_of_a_gpu_take_what_they_are_given(kernel: type, causal: bool) -> None:
    """Without a GPU: their shapes alone, on torch's meta device."""
    q, k, v, grad = (
        torch.empty(S, B, heads, D, device="meta", dtype=torch.bfloat16).permute(1, 2, 0, 3)
        for heads in (H, 2, 2, H)
    )
    one = kernel(causal=causal, scale=0.25)
    attended = one.forward(q, k, v)
    assert attended.output.shape == q.shape
    assert attended.lse.shape == q.shape[:3]
    found = one.backward(grad, (q, k, v), attended)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


def test_runs_that_follow_one_another_are_one() -> None:
    assert joined([(0, 4), (4, 4), (12, 4), (16, 2)]) == [(0, 8), (12, 6)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention_dropout": 0.1}, r"^--attention-dropout: split's kernels .* got 0\.1; use"),
        ({"window_size": (8, 0)}, r"^--window-size: split's kernels .* got \(8, 0\); use"),
        ({"softmax_type": "off-by-one"}, r"^--softmax-type: split's .* got off-by-one; use"),
        ({"kv_channels": 320}, r"^--kv-channels: .* of 8 up to 256 channels, got 320; use"),
    ],
)
def test_what_its_kernels_lack_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(SplitAttention, CAUSAL, **options)


def test_masks_packed_sequences_and_biases_are_refused() -> None:
    core = build(SplitAttention, AttnMaskType.padding)
    for mask, more in (
        (hidden(B, S, S), {}),
        (None, {"attention_bias": torch.zeros(1)}),
        (None, {"packed_seq_params": object()}),
    ):
        with pytest.raises(
            ValueError, match=r"^--helix-core-attention: split takes neither a mask"
        ):
            core(*tensors(S, S, H), mask, **more)

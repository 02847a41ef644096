"""``PrefixAttention`` against stock ``DotProductAttention``: outputs and every gradient."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels.prefix_attention import PrefixAttention
from tests.core_attention_case import B, D, H, build, gradients, hidden, one_rank, tensors

S = 40
CAUSAL = AttnMaskType.causal
NARROW = {"kv_channels": 4}  # of fewer channels than keys: probabilities are computed again
RATE = 0.375


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What stock attention asks for."""
    with one_rank():
        yield


def in_pieces(**options: Any) -> Any:
    """Of eight queries each, in parts of a sequence, or of some heads of it."""
    mask_type = options.pop("mask_type", CAUSAL)
    core = build(PrefixAttention, mask_type, **options)
    core.least, core.scores, core.filling = 8, 800, 1
    return core


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"mask_type": AttnMaskType.no_mask},
    "grouped queries": {"num_query_groups": 2},
    "one query group": {"num_query_groups": 1},
    "a mask for each sequence": {"mask": B, "mask_type": AttnMaskType.padding},
    "a mask for all sequences": {"mask": 1, "mask_type": AttnMaskType.padding},
    "one query": {"queries": 1},
    "sliding window": {"window_size": (3, 0)},
    "sliding window, wider than a piece": {"window_size": (11, 0), "num_query_groups": 2},
    "sliding window, fewer queries": {"window_size": (3, 0), "queries": 20},
    "window that looks ahead": {"window_size": (5, 9)},
    "scaling by layer": {"apply_query_key_layer_scaling": True},
    "off-by-one softmax": {"softmax_type": "off-by-one"},
    "learnable offset": {"softmax_type": "learnable", "num_query_groups": 2},
    "learnable offset, a mask": {
        **{"softmax_type": "learnable", "mask": B, "mask_type": AttnMaskType.padding},
    },
    "learnable offset, scaling by layer": {
        **{"softmax_type": "learnable", "apply_query_key_layer_scaling": True},
    },
}


@pytest.mark.parametrize("channels", [D, NARROW["kv_channels"]])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prefix_is_stock(case: dict[str, Any], channels: int) -> None:
    options = {**case, "kv_channels": channels}
    queries, masks = options.pop("queries", S), options.pop("mask", 0)
    mask_type = options.pop("mask_type", CAUSAL)
    stock = build(DotProductAttention, mask_type, **options)
    prefix = in_pieces(mask_type=mask_type, **options)
    if options.get("softmax_type") == "learnable":
        torch.nn.init.normal_(stock.softmax_offset)
        prefix.load_state_dict(stock.state_dict())
    inputs = tensors(queries, S, options.get("num_query_groups", H), channels)
    mask = hidden(masks, queries, S) if masks else None
    expected = gradients(stock, inputs, mask, attn_mask_type=mask_type)
    actual = gradients(prefix, inputs, mask, attn_mask_type=mask_type)
    for name, one in expected.items():
        torch.testing.assert_close(actual[name], one, msg=lambda said, name=name: f"{name}: {said}")


def test_a_row_that_a_mask_hides_is_as_in_stock() -> None:
    mask = hidden(B, S, S)
    mask[1, :, 9] = True
    kind = AttnMaskType.padding
    stock, prefix = build(DotProductAttention, kind), in_pieces(mask_type=kind)
    expected = gradients(stock, tensors(S, S, H), mask)
    for name, one in gradients(prefix, tensors(S, S, H), mask).items():
        torch.testing.assert_close(one, expected[name])


@pytest.mark.parametrize(
    "options", [{}, NARROW, {"window_size": (6, 0)}, {"num_query_groups": 2, "mask": True}]
)
def test_runs_of_queries_have_the_rows_of_the_whole(options: dict[str, Any]) -> None:
    """As a sequence split deals them: output and query gradient by rows, the others as sums."""
    options = dict(options)
    mask = hidden(B, S, S) & ~torch.eye(S, dtype=torch.bool) if options.pop("mask", False) else None
    core = in_pieces(**options)
    query, *rest = tensors(S, S, options.get("num_query_groups", H), options.get("kv_channels", D))
    whole = gradients(core, [query, *rest], mask)
    dealt = [[(0, 8), (24, 16)], [(8, 16)]]
    grad = torch.randn(whole["output"].shape, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (query, *rest)]
    expected = torch.autograd.grad(core(*leaves, mask), leaves, grad)
    found = [torch.zeros_like(x) for x in leaves]
    for runs in dealt:
        rows = torch.cat([torch.arange(first, first + length) for first, length in runs])
        part = None if mask is None else mask[..., rows, :]
        output = core(leaves[0][rows], *leaves[1:], part, runs=runs)
        torch.testing.assert_close(output, whole["output"][rows])
        for total, one in zip(found, torch.autograd.grad(output, leaves, grad[rows]), strict=True):
            total += one
    for total, one in zip(found, expected, strict=True):
        torch.testing.assert_close(total, one)


HALVES = {
    torch.bfloat16: {"params_dtype": torch.bfloat16, "bf16": True},
    torch.float16: {"params_dtype": torch.float16, "fp16": True},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [H, 1])
def test_half_precision_is_as_close_as_stock(dtype: torch.dtype, groups: int) -> None:
    """Against double precision: a key's gradient is rounded once for each of 8 pieces."""
    options: dict[str, Any] = {"num_query_groups": groups}
    stock = build(DotProductAttention, CAUSAL, **options, **HALVES[dtype])
    prefix = in_pieces(**options, **HALVES[dtype])
    exact = build(DotProductAttention, CAUSAL, **options)
    inputs = [x.to(dtype) for x in tensors(256, 256, groups)]
    expected = gradients(exact, [x.double() for x in inputs], None)
    ours, theirs = gradients(prefix, inputs, None), gradients(stock, inputs, None)
    for name, one in expected.items():
        assert ours[name].dtype == dtype
        error, allowed = (distance(x[name], one) for x in (ours, theirs))
        assert 0 < error <= 1.3 * allowed, f"{name}: {error:.1e}, stock {allowed:.1e}"


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of all elements together."""
    return float((found.double() - exact).norm() / exact.norm())


def test_an_offset_s_gradient_in_half_precision_is_as_close_as_stock() -> None:
    """Of some draws together: it is four numbers, each a sum in which much cancels."""
    options, half = {"softmax_type": "learnable"}, HALVES[torch.bfloat16]
    cores = [build(DotProductAttention, CAUSAL, **options), in_pieces(**options, **half)]
    cores[1].scores = PrefixAttention.scores  # all heads at once: it is the sum that rounds
    cores.append(build(DotProductAttention, CAUSAL, **options, **half))
    found: list[list[torch.Tensor]] = [[], [], []]
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(128, B, H, D, generator=draw).bfloat16() for _ in range(3)]
        offset = torch.randn(H, generator=draw).bfloat16()
        for core, grads in zip(cores, found, strict=True):
            core.softmax_offset.data.copy_(offset)
            given = [x.to(core.softmax_offset.dtype) for x in inputs]
            grads.append(gradients(core, given, None)["offset"].double())
    exact, ours, theirs = map(torch.cat, found)
    assert distance(ours, exact) <= 2 * distance(theirs, exact)


def saved_elements(core: Any, groups: int = H, channels: int = D) -> int:
    """What a forward pass keeps for the backward pass."""
    kept: list[int] = []
    inputs = [x.requires_grad_() for x in tensors(S, S, groups, channels)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        core(*inputs, None)
    return sum(kept)


def test_probabilities_are_kept_where_they_are_small() -> None:
    pieces = B * H * sum(8 * end for end in range(8, S + 1, 8))
    for channels in (D, 6):  # 1/2 and 4/3 times what is given
        given = sum(x.numel() for x in tensors(S, S, H, channels))
        core = in_pieces(kv_channels=channels)
        assert saved_elements(core, channels=channels) == given + pieces
    given = sum(x.numel() for x in tensors(S, S, H, NARROW["kv_channels"]))
    narrow = in_pieces(**NARROW)
    assert saved_elements(narrow, channels=NARROW["kv_channels"]) == given


def test_one_piece_drops_what_stock_drops() -> None:
    dropped = []
    for cls in (DotProductAttention, PrefixAttention):
        core = build(cls, CAUSAL, attention_dropout=RATE)
        with one_rank():
            dropped.append(gradients(core, tensors(S, S, H), None))
    for name, one in dropped[0].items():
        torch.testing.assert_close(dropped[1][name], one)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("channels", [S, S // 10])
def test_dropout_keeps_its_share_and_the_backward_pass_drops_alike(
    channels: int, sequence_parallel: bool
) -> None:
    core = in_pieces(attention_dropout=RATE, kv_channels=channels, num_query_groups=2)
    core.config.sequence_parallel = sequence_parallel
    query, key, _ = tensors(S, S, 2, channels)
    value = torch.eye(S, channels, dtype=torch.float64)[:, None, None].repeat(1, B, 2, 1)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]

    def run(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        get_cuda_rng_tracker().reset()
        get_cuda_rng_tracker().add("model-parallel-rng", 5)
        return core(*given, None)

    output = run(*leaves)
    assert torch.equal(output, run(*leaves))
    weights = output.view(S, B, H, channels).permute(1, 2, 0, 3)  # of the first keys
    seen = torch.ones(S, channels, dtype=torch.bool).tril()
    kept = weights[..., seen] != 0
    deviation = (RATE * (1 - RATE) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - RATE)) <= 6 * deviation
    core.eval()
    plain = core(query, key, value, None).view(S, B, H, channels).permute(1, 2, 0, 3)
    core.train()
    torch.testing.assert_close(weights[weights != 0] * (1 - RATE), plain[weights != 0])
    grad = torch.randn(output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, grad)
    step = [torch.randn_like(x) for x in leaves]
    with torch.no_grad():
        ahead, behind = (
            run(*(x + sign * 1e-6 * d for x, d in zip(leaves, step, strict=True)))
            for sign in (1, -1)
        )
    slope = ((ahead - behind) * grad).sum() / 2e-6
    expected = sum((one * d).sum() for one, d in zip(found, step, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_dropout_in_half_precision_is_that_of_double() -> None:
    """The same seed drops the same, at the same scale."""
    options = {"attention_dropout": RATE, "num_query_groups": 2}
    inputs = [x.bfloat16() for x in tensors(S, S, 2)]
    found = []
    for more in (HALVES[torch.bfloat16], {}):
        core = in_pieces(**options, **more)
        with one_rank():
            given = [x.to(core.config.params_dtype) for x in inputs]
            found.append(gradients(core, given, None))
    for name, exact in found[1].items():
        assert distance(found[0][name], exact) <= 0.02, name


def test_what_is_not_contiguous_and_what_was_not_written_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed queries, keys and values as views of one tensor; fresh memory full of NaN."""
    packed = torch.randn(S, B, H, 3 * D, dtype=torch.float64)
    inputs = list(packed.split(D, dim=-1))
    expected = gradients(build(DotProductAttention, CAUSAL), [x.contiguous() for x in inputs], None)
    leaves = [x.detach().requires_grad_() for x in inputs]
    assert not leaves[0].is_contiguous()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        actual = gradients(in_pieces(window_size=(S, 0)), leaves, None)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, one in expected.items():
        torch.testing.assert_close(actual[name], one)


def test_packed_sequences_and_biases_are_refused() -> None:
    core = in_pieces()
    for given in ({"attention_bias": torch.zeros(1)}, {"packed_seq_params": object()}):
        with pytest.raises(ValueError, match=r"^--helix-core-attention: prefix takes neither"):
            core(*tensors(S, S, H), None, **given)

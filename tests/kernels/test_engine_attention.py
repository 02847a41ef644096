"""TransformerEngine's fused attention in parts: what its functions are asked, without a GPU.

A stand-in of the functions keeps their contract (arguments by name, layouts, where the log-sum-exp
lies) and computes with the plain kernel of :mod:`tests.gap_case`.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_helix.kernels import engine_attention
from megatron_helix.kernels.engine_attention import EngineKernel, kernel_of
from megatron_helix.kernels.gap_attention import ALL, Block, Packed
from tests.gap_case import Plain

SCALE = 0.25
HEADS, GROUPS, D = 4, 2, 8


def _block(given: dict[str, Any]) -> Block:
    """The call as it was asked for."""
    assert given["fake_dtype"] == torch.float64
    assert given["fused_attention_backend"] == "sub-backend"
    assert given["dropout"] == 0.0
    causal = "causal" in given["attn_mask_type"]
    ends = given["cu_seqlens_q"], given["cu_seqlens_kv"]
    assert all(x.dtype == torch.int32 for x in ends)
    if given["qkv_layout"] == "sbhd_sbhd_sbhd":
        assert given["o_format"] == "sbhd"
        assert given["attn_mask_type"] in ("causal", "no_mask")
        rows, sequences, *_ = given["q"].shape
        assert given["max_seqlen_q"] == rows
        assert given["max_seqlen_kv"] == len(given["k"])
        assert ends[0].tolist() == [rows * i for i in range(sequences + 1)]
        assert ends[1].tolist() == [len(given["k"]) * i for i in range(sequences + 1)]
        return Block(causal)
    assert (given["qkv_layout"], given["o_format"]) == ("thd_thd_thd", "thd")
    assert given["attn_mask_type"] in ("padding_causal", "padding")
    firsts = given["cu_seqlens_q_padded"], given["cu_seqlens_kv_padded"]
    most = given["max_seqlen_q"], given["max_seqlen_kv"]
    return Block(causal, packed=Packed(*ends, *firsts, *most, None))


def _stats(lse: torch.Tensor, packed: bool) -> torch.Tensor:
    """``[t, H, 1]``, or ``[b, H, s, 1]``."""
    return (lse if packed else lse.permute(1, 2, 0)).unsqueeze(-1).contiguous()


class _Functions:
    FusedAttnBackend = {"F16_arbitrary_seqlen": "sub-backend"}  # noqa: RUF012
    plain = Plain(SCALE)

    def fused_attn_fwd(self, *, is_training: bool, **given: Any) -> Any:
        assert is_training
        assert given["attn_scale"] == SCALE
        block = _block(given)
        output, lse, _ = self.plain.forward(block, *(given[name] for name in "qkv"))
        return output, [_stats(lse, block.packed is not None), torch.ones(2)]

    def fused_attn_bwd(self, **given: Any) -> Any:
        block = _block(given)
        assert given["do_format"] == given["o_format"]
        assert given["dqkv_layout"] == given["qkv_layout"]
        stats, state = given["aux_ctx_tensors"]
        assert torch.equal(state, torch.ones(2))
        assert stats.is_contiguous()
        lse = stats.squeeze(-1) if block.packed else stats.squeeze(-1).permute(2, 0, 1)
        qkv = tuple(given[name] for name in "qkv")
        found = self.plain.backward(block, given["d_o"], qkv, given["o"], lse, state)
        return *found, None, None


PACKED = Packed(
    *(torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5], [0, 2, 6], [1, 5, 9], [0, 3, 7])),
    most_queries=3,
    most_keys=4,
    seen=None,
)
BLOCKS = {
    "causal": (Block(True), (6, 2), (6, 2)),
    "full": (Block(False, slice(2, 6), ALL), (4, 2), (7, 2)),
    "packed": (Block(False, packed=PACKED), (9,), (7,)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_its_functions_are_asked_for_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_attention, "_functions", _Functions)
    block, of_query, of_key = BLOCKS[name]
    draw = torch.Generator().manual_seed(1)
    query, key, value, grad = (
        torch.randn(*shape, heads, D, generator=draw, dtype=torch.float64)
        for shape, heads in (
            (of_query, HEADS),
            (of_key, GROUPS),
            (of_key, GROUPS),
            (of_query, HEADS),
        )
    )
    ours, plain = EngineKernel(scale=SCALE), Plain(SCALE)
    output, lse, state = ours.forward(block, query, key, value)
    expected, expected_lse, _ = plain.forward(block, query, key, value)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    assert lse.is_contiguous()
    given = (query, key, value), output, lse
    found = ours.backward(block, grad, *given, state)
    for one, other in zip(found, plain.backward(block, grad, *given, state), strict=True):
        torch.testing.assert_close(one, other)


def core(**given: Any) -> Any:
    """What is read of TransformerEngine's core attention, and Megatron's config beside it."""
    config = {
        "attention_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
        "params_dtype": torch.bfloat16,
        "kv_channels": 128,
    }
    own = {
        "fused_attention": object(),
        "window_size": (-1, 0),
        "softmax_type": "vanilla",
        "softcap": 0.0,
        "return_max_logit": False,
        "deterministic": False,
        "softmax_scale": 0.5,
    }
    of_config = {name: given.get(name, value) for name, value in config.items()}
    of_core = {name: given.get(name, value) for name, value in own.items()}
    return SimpleNamespace(config=SimpleNamespace(**of_config), **of_core)


LACKING = {
    "fused_attention": None,
    "attention_dropout": 0.1,
    "window_size": (128, 0),
    "softmax_type": "learnable",
    "softcap": 30.0,
    "return_max_logit": True,
    "deterministic": True,
    "apply_query_key_layer_scaling": True,
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "params_dtype": torch.float32,
    "kv_channels": 512,
}


def test_a_core_attention_has_a_kernel_where_it_lacks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_attention, "_knows_parts", lambda: True)
    monkeypatch.delenv("NVTE_FUSED_ATTN", raising=False)
    assert kernel_of(core()) == EngineKernel(scale=0.5)
    for name, value in LACKING.items():
        assert kernel_of(core(**{name: value})) is None, name
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert kernel_of(core()) is None


def test_an_older_engine_has_none() -> None:
    """Nor has a machine without one."""
    assert kernel_of(core()) is None

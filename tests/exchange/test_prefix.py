"""Keys and values that several chunks of queries see: their gradients, added up, against whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.exchange import tokens
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.prefix import PrefixPieces
from megatron_helix.partition.layout import HelixLayout

S, B, H, D = 128, 2, 4, 32
Tensors = list[torch.Tensor]


class _Core(torch.nn.Module):
    """Causal attention with its softmax in fp32, as kernels have it."""

    def forward(self, *qkv: torch.Tensor, **_: Any) -> torch.Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in qkv[:3])
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * D**-0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(key.size(2) - query.size(2) + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype)
        return (weights @ value).permute(2, 0, 1, 3).reshape(-1, B, H * D)


class _Call(_Core):
    def forward(self, *qkv: torch.Tensor, **_: Any) -> torch.Tensor:
        assert qkv[0].size(0) <= tokens.QUERIES
        return super().forward(*qkv)


class _InChunks(PrefixPieces, _Call):
    def __init__(self, chunks: int):
        super().__init__()
        self.plan = Plan(exchange="weights", split="sequence", balanced=False)
        heads = {"num_attention_heads": 8, "num_query_groups": 8}
        self.helix_layout = HelixLayout(m=1, n=chunks, kv_channels=D, **heads)
        self.helix_groups: Any = SimpleNamespace(segment=0)

    def _rows(self, *_: Any) -> None:
        return None


def _gradients(core: torch.nn.Module, dtype: torch.dtype) -> Tensors:
    """Of keys and values, drawn in bfloat16."""
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randn(S, B, H, D, generator=draw).bfloat16().to(dtype) for _ in range(4)]
    query, key, value = (x.requires_grad_() for x in drawn[:3])
    y = core(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    y.backward(drawn[3].reshape(S, B, -1))
    assert key.grad is not None
    assert value.grad is not None
    return [key.grad, value.grad]


@pytest.mark.parametrize(("chunks", "queries"), [(1, S), (2, S), (8, S), (2, 24)])
def test_gradients_of_keys_and_values_are_added_up_as_one_kernel_would(
    chunks: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "QUERIES", queries)
    exact = _gradients(_Core(), torch.float64)
    for found, expected in zip(_gradients(_InChunks(chunks), torch.float64), exact, strict=True):
        torch.testing.assert_close(found, expected)

    def errors(core: torch.nn.Module) -> list[float]:
        halves = _gradients(core, torch.bfloat16)
        return [
            float((half.double() - whole).norm() / whole.norm())
            for half, whole in zip(halves, exact, strict=True)
        ]

    for ours, whole in zip(errors(_InChunks(chunks)), errors(_Core()), strict=True):
        assert ours <= 1.35 * whole  # each chunk's share is rounded, and their sum

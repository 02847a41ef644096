"""``FFPAAttention`` as far as it goes without a GPU: what it refuses, and when it imports."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels.ffpa_attention import FFPAAttention
from tests.core_attention_case import H, build, one_rank, tensors

WIDE = {"kv_channels": 320}
CAUSAL = AttnMaskType.causal


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What core attentions ask Megatron for."""
    with one_rank():
        yield


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention_dropout": 0.1}, r"^--attention-dropout: ffpa's kernels .* got 0\.1; use"),
        ({"window_size": (8, 0)}, r"^--window-size: ffpa's kernels .* got \(8, 0\); use"),
        ({"softmax_type": "off-by-one"}, r"^--softmax-type: ffpa's kernels .* got off-by-one; use"),
        ({"kv_channels": 256}, r"^--kv-channels: .* take 320 to 512 channels, got 256; use"),
    ],
)
def test_what_its_kernels_lack_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(FFPAAttention, CAUSAL, **{**WIDE, **options})


def test_masks_packed_sequences_and_biases_are_refused_and_a_missing_package_named() -> None:
    core = build(FFPAAttention, AttnMaskType.padding, **WIDE)
    inputs = tensors(8, 8, H, WIDE["kv_channels"])
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    for given, more in (
        (mask, {}),
        (None, {"attention_bias": torch.zeros(1)}),
        (None, {"packed_seq_params": object()}),
    ):
        with pytest.raises(ValueError, match=r"^--helix-core-attention: ffpa takes neither a mask"):
            core(*inputs, given, **more)
    with pytest.raises(ValueError, match=r"ffpa needs the package ffpa-attn, .* install 'megatron"):
        core(*inputs, mask, attn_mask_type=CAUSAL)  # the mask is the causal one: not looked at
    assert "ffpa_attn" not in sys.modules

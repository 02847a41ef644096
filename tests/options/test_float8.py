"""FP8 and a partition: what is refused, whatever else of FP8 is."""

from typing import Any

import pytest

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice
from megatron_helix.options.float8 import require_float8, require_float8_tokens
from megatron_helix.partition.layout import HelixLayout
from tests.cpu_config import cpu_config

LEAVE = "or leave --fp8-format hybrid away$"
HEADS = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16}
SIZES = {"hidden_size": 96, "ffn_hidden_size": 192}
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "add_bias_linear": False}


def check(exchange: str = "weights", m: int = 2, *, fp8: Any = "hybrid", **changed: Any) -> None:
    """On two head groups."""
    heads = {name: changed.pop(name, size) for name, size in HEADS.items()}
    config = cpu_config(num_layers=1, **heads, **{**SIZES, **changed})
    config.fp8 = fp8  # behind Megatron's own checks, which are of the card
    require_float8(Choice(exchange=exchange), config, HelixLayout(m=m, n=2, **heads))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            {"exchange": "scores"},
            "^--helix-exchange: scores has not been run .*; use activations or weights, ",
        ),
        (
            {"m": 3},
            "^--helix-m: FP8 needs segments without padding, got 3 segments of --kv-channels 16,"
            " stored as 18; use a --helix-m that divides, ",
        ),
        (
            {"hidden_size": 112},
            r"^--hidden-size: must be a multiple of 16 x --helix-m \(32\) for FP8, got 112; use"
            " another, --helix-exchange activations, ",
        ),
        (
            {"m": 3, "kv_channels": 24, "hidden_size": 128, "exchange": "auto"},
            r"^--hidden-size: must be a multiple of 16 x --helix-m \(48\) for FP8, got 128; ",
        ),
        (
            {"hidden_size": 104, "exchange": "activations"},
            "^--hidden-size: must be a multiple of 16 for FP8, got 104; use another, ",
        ),
        (
            {"m": 4, "hidden_size": 128},
            "^--kv-channels: a rank must have a multiple of 16 columns of the output projection"
            " for FP8, got 8 under --helix-m 4 --helix-n 2; use another layout or size, ",
        ),
        (
            {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 8},
            "^--kv-channels: .* 16 rows of the QKV projection for FP8, got 24 under",
        ),
        (
            {"ffn_hidden_size": 96},
            "^--ffn-hidden-size: a rank must have a multiple of 16 features for FP8, got 24 under",
        ),
    ],
)
def test_what_fp8_does_not_go_with_is_refused(case: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message + ".*" + LEAVE):
        check(**case)
    check(**case, fp8=None)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"exchange": "activations", "hidden_size": 112},
        {"m": 4, "kv_channels": 32, "hidden_size": 128, "ffn_hidden_size": 128},
        {"ffn_hidden_size": 96, **MOE},  # no dense MLP
    ],
)
def test_what_has_whole_words_passes(case: dict[str, Any]) -> None:
    check(**case)


@pytest.mark.parametrize(
    ("exchange", "m", "sequence_parallel", "of"),
    [
        ("weights", 2, True, 32),
        ("auto", 4, True, 64),
        ("activations", 4, True, 64),
        ("activations", 4, False, 16),
    ],
)
def test_a_rank_multiplies_whole_words_of_tokens(
    exchange: str, m: int, sequence_parallel: bool, of: int
) -> None:
    cut = HelixLayout(m=m, n=2, **HEADS)
    config = cpu_config(num_layers=1, **HEADS, **SIZES)
    config.sequence_parallel, config.fp8 = sequence_parallel, "hybrid"
    require_float8_tokens(Choice(exchange=exchange), config, cut, 3 * of)
    message = (
        rf"^--seq-length: micro-batches must be of a multiple of {of} tokens for FP8 under"
        rf" --helix-m {m} --helix-n 2, got {3 * of + 8}; use {3 * of} or {4 * of} of them, {LEAVE}"
    )
    with pytest.raises(UserError, match=message):
        require_float8_tokens(Choice(exchange=exchange), config, cut, 3 * of + 8)
    config.fp8 = None
    require_float8_tokens(Choice(exchange=exchange), config, cut, 3 * of + 8)

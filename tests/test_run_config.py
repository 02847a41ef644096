"""Layouts: their flags, and what cannot be meant."""

from typing import Any

import pytest
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from pydantic import ValidationError

from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig, rotated_channels

MODEL = ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    kv_channels=16,
    ffn_hidden_size=256,
)
UNTIED = MODEL.model_copy(update={"untie_embeddings_and_output_weights": True})


def layout(**keys: Any) -> LayoutConfig:
    """A layout of one tensor-parallel rank, unless it says otherwise."""
    cut = {} if "m" in keys else {"tp": 1}
    return LayoutConfig(name="case", micro_batch=1, **{**cut, **keys})


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        (
            {"fsdp": "megatron_fsdp"},
            "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params"
            " --ckpt-format fsdp_dtensor --use-distributed-optimizer --overlap-grad-reduce"
            " --overlap-param-gather",
        ),
        ({"fsdp": "torch_fsdp2"}, "--use-torch-fsdp2 --ckpt-format torch_dist"),
        ({"tp": 2, "gtp": 2}, "--tensor-parallel-num-weight-shards 4"),
        ({"cp": 2}, "--context-parallel-size 2"),
        ({"cp": 2, "cp_comm_type": "a2a"}, "--context-parallel-size 2 --cp-comm-type a2a"),
        ({"overlap_dp": True}, "--overlap-grad-reduce"),
        (
            {"overlap_dp": True, "distributed_optimizer": True},
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ),
    ],
)
def test_a_stock_layout_says_its_flags(keys: dict[str, Any], flags: str) -> None:
    assert " ".join(layout(**keys).flags(MODEL)).endswith(flags)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"m": 2, "n": 1}, "spec"),  # where a run of its own would take auto
        ({"m": 2, "n": 1, "core_attention": "auto"}, "auto"),
        ({"tp": 2, "core_attention": "auto"}, "auto"),
        ({"tp": 2}, None),
    ],
)
def test_layouts_differ_in_core_attention_only_where_they_say_so(
    keys: dict[str, Any], said: str | None
) -> None:
    words, flag = layout(**keys).flags(MODEL), "--helix-core-attention"
    assert (words[words.index(flag) + 1] if flag in words else None) == said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"m": 2, "n": 1, "fsdp": "torch_fsdp2"}, "fsdp, gtp: share out the weights that m and n"),
        ({"m": 2, "n": 1, "gtp": 2}, "fsdp, gtp: share out the weights that m and n"),
        ({"fsdp": "megatron_fsdp", "pp": 2}, "pp: must be 1 with fsdp: megatron_fsdp, .* got 2"),
        ({"fsdp": "megatron_fsdp", "gtp": 2}, "gtp: must be 1 with fsdp, got 2"),
        ({"fsdp": "megatron_fsdp", "distributed_optimizer": True}, "distributed_optimizer: fsdp"),
        ({"fsdp": "torch_fsdp2", "overlap_dp": True}, "overlap_dp: fsdp does so by itself"),
        ({"fsdp": "torch_fsdp2", "pp": 2}, "pp: must be 1 with fsdp: torch_fsdp2, .* got 2"),
        ({"fsdp": "torch_fsdp2", "ep": 2}, "ep: must be 1 with fsdp: torch_fsdp2, .* got 2"),
        ({"gather_layers": 1}, "gather_layers: must be left out of a stock layout"),
        (
            {"m": 2, "n": 1, "gather_layers": 1},
            "gather_layers: needs gather: once or step, got 1 and no gather; say gather, or leave",
        ),
        ({"m": 2, "n": 1, "gather": "once", "gather_layers": 0}, "greater than 0"),
        ({"fsdp": "fsdp1"}, "Input should be 'megatron_fsdp' or 'torch_fsdp2'"),
        ({"cp_comm_type": "a2a"}, "cp_comm_type: needs context parallelism, cp > 1, got a2a"),
        ({"cp": 2, "cp_comm_type": "ring"}, "Input should be 'p2p', 'a2a' or 'all_gather'"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        layout(**keys)


def test_fsdp_takes_fp32_and_bf16_and_torchs_untied_models() -> None:
    sharded = layout(fsdp="torch_fsdp2")
    sharded.require_model(UNTIED, "bf16")
    with pytest.raises(ValueError, match=r"^fsdp: torch_fsdp2 needs untie_embeddings.*got false"):
        sharded.require_model(MODEL, "bf16")
    with pytest.raises(ValueError, match=r"^fsdp: torch_fsdp2 trains in fp32 or bf16.*got fp16"):
        sharded.require_model(UNTIED, "fp16")
    layout(fsdp="megatron_fsdp").require_model(MODEL, "bf16")
    with pytest.raises(ValueError, match=r"^fsdp: megatron_fsdp trains in fp32 or bf16.*got fp16"):
        layout(fsdp="megatron_fsdp").require_model(MODEL, "fp16")
    layout(gtp=2).require_model(MODEL, "bf16")
    for biased in ("add_qkv_bias", "add_bias_linear"):
        with pytest.raises(ValueError, match=r"^gtp: must be 1 for a model whose QKV has a bias"):
            layout(gtp=2).require_model(MODEL.model_copy(update={biased: True}), "bf16")


@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_rotated_channels_are_those_of_megatrons_embeddings(percent: float) -> None:
    """Which `scores` cuts: YaRN's are all channels, whatever --rotary-percent."""
    made = {
        "rope": RotaryEmbedding(16, percent, use_cpu_initialization=True),
        "yarn": YarnRotaryEmbedding(16, percent, use_cpu_initialization=True),
    }
    for kind, embedding in made.items():
        frequencies = embedding(8)[0] if kind == "yarn" else embedding(8)
        assert rotated_channels(kind, percent, 16) == frequencies.size(-1), kind
    of_sections = MultimodalRotaryEmbedding(16, percent)
    assert rotated_channels("mrope", percent, 16) == 2 * of_sections.inv_freq.numel()
    assert rotated_channels("learned_absolute", percent, 16) == 0

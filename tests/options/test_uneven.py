"""Features that the ranks do not divide: what of a model is, and what cannot run beside padding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_helix.options.uneven import require_paddable, uneven
from tests.cpu_config import cpu_config

MOE = {
    **{"num_moe_experts": 4, "moe_ffn_hidden_size": 38, "add_bias_linear": False},
    **{"moe_shared_expert_intermediate_size": 46, "expert_tensor_parallel_size": 3},
}


def config(tp: int = 3, **fields: Any) -> Any:
    """A model of 254 features on ranks that may not divide them."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 6, "ffn_hidden_size": 254}
    return cpu_config(**{**sizes, "tensor_model_parallel_size": tp, **fields})


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"tp": 2}, []),
        ({}, ["--ffn-hidden-size"]),
        (MOE, ["--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size"]),
        ({**MOE, "expert_tensor_parallel_size": 1}, ["--moe-shared-expert-intermediate-size"]),
        (
            {**MOE, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": None},
            ["--ffn-hidden-size", "--moe-ffn-hidden-size"],
        ),
    ],
)
def test_what_is_padded_is_what_a_model_has(fields: dict[str, Any], flags: list[str]) -> None:
    assert [one.flag for one in uneven(config(**fields))] == flags


def test_the_waste_is_said() -> None:
    (features,) = uneven(config())
    said = "helix: --ffn-hidden-size 254 is stored as 255 by 3 ranks: 0.39% more, of zeros"
    assert str(features) == said


def shifted(x: torch.Tensor) -> torch.Tensor:
    """An activation that is not zero at zero."""
    return torch.sigmoid(x)


@pytest.mark.parametrize(
    ("args", "fields", "message"),
    [
        ({}, {"activation_func": shifted}, "^activation_func: shifted is not zero at zero"),
        ({"log_num_zeros_in_grad": True}, {}, "^--log-num-zeros-in-grad: is refused where"),
        ({"adam_eps": 0.0}, {}, "^--adam-eps: is refused where .*, got 0.0"),
        ({}, {"moe_mlp_glu_interleave_size": 2}, "^--moe-mlp-glu-interleave-size: is refused"),
        ({"ckpt_format": "torch"}, {}, "^--ckpt-format torch: is refused where --ffn-hidden-size"),
        ({"optimizer": "muon"}, {}, "^--optimizer muon: is refused where --ffn-hidden-size 254"),
    ],
)
def test_what_cannot_run_beside_padding_is_refused(
    args: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    plain = {"load": None, "pretrained_checkpoint": None, "non_persistent_ckpt_type": None}
    given = SimpleNamespace(**plain, ckpt_step=None, **args)
    remedy = ".*; (leave it away|use another), or use --ffn-hidden-size 255, which they divide$"
    with pytest.raises(ValueError, match=message + remedy):
        require_paddable(given, config(**fields))
    require_paddable(given, config(tp=2, **fields))  # 254 features are even


@pytest.mark.parametrize("name", ["gelu", "silu", "relu"])
def test_activations_that_are_zero_at_zero_pass(name: str) -> None:
    plain = {"load": None, "pretrained_checkpoint": None, "non_persistent_ckpt_type": None}
    activation = getattr(torch.nn.functional, name)
    require_paddable(SimpleNamespace(**plain, ckpt_step=None), config(activation_func=activation))

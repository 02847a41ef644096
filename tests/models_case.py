"""The public models of configs/models, and the same as small as a test can train them."""

from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.model import ModelConfig
from tests.script_module import script_module

ROOT = Path(__file__).parents[1]

MODELS = {
    path.stem: read_config(ModelConfig, path)
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml"))
    if "Source:" in path.read_text()
}


def scaled(name: str) -> ModelConfig:
    """The model with its heads and kinds, as small as a test needs it.

    Experts are as many as a token goes to: else one near a tie may go to another by roundoff.
    """
    model = MODELS[name]
    smaller: dict[str, Any] = {
        **{"num_layers": 2, "hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 64},
        **{"max_position_embeddings": 32, "vocab_size": 256, "apply_layernorm_1p": False},
    }
    if model.num_experts:
        smaller["num_experts"] = model.moe_router_topk
    if model.window_size:
        smaller["window_size"] = (7, 0)
    if model.window_attn_skip_freq:
        smaller["window_attn_skip_freq"] = 2
    if model.yarn_original_max_position_embeddings:
        smaller["yarn_original_max_position_embeddings"] = 16
    return model.model_copy(update=smaller)


def page_script() -> ModuleType:
    """The script that writes docs/models.md."""
    return script_module("docs/models.py")

"""Megatron's local layer spec with a core attention of a test's own."""

import dataclasses
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec


def with_core_attention(core_attention: type) -> Any:
    """The spec of a dense layer."""
    spec = get_gpt_layer_local_spec()
    attention = spec.submodules.self_attention
    own = dataclasses.replace(attention.submodules, core_attention=core_attention)
    attention = dataclasses.replace(attention, submodules=own)
    return dataclasses.replace(
        spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention)
    )

"""How long a process takes to start a layer's kernels, for ``helix calibrate``.

A GPU runs them behind its process's back. Of small layers it is through before the next ones are
started, and a step takes as long as its processes do. So the layer here is a small one, and the
clock is the process's own. It is the least that a step needs: embedding, head, data and optimizer
come on top. On one H200 host 1.9 ms a layer and pass; a step of two small layers by TP=2, four
micro-batches, took 89 ms where that makes 30.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

REPEATS = 30
_LENGTH, _HIDDEN, _HEADS = 32, 256, 4


def measure(device: str) -> dict[str, float]:
    """Seconds of a process for a layer's ``forward`` and ``backward`` pass of one micro-batch.

    Megatron's groups are there already (:func:`megatron_helix.planner.core_timing.alone`).

    Args:
        device: ``cpu`` or ``cuda``; a CPU computes meanwhile, and its times are no process's alone.
    """
    layer = _layer(device)
    x = torch.randn(_LENGTH, 1, _HIDDEN, device=device, dtype=layer.config.params_dtype)
    x.requires_grad_()

    def forward() -> torch.Tensor:
        return layer(x, attention_mask=None)[0]

    both = _seconds(lambda: forward().backward(x), device)
    alone = _seconds(forward, device)
    return {"forward": alone, "backward": max(both - alone, 1e-6)}


def _layer(device: str) -> Any:
    """A dense layer of the usual spec: TransformerEngine's, where that is installed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = TransformerConfig(
        num_layers=1,
        hidden_size=_HIDDEN,
        num_attention_heads=_HEADS,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=device == "cpu",
    )
    engine = device == "cuda" and find_spec("transformer_engine")
    parts = (
        get_gpt_layer_with_transformer_engine_submodules()
        if engine
        else get_gpt_layer_local_submodules()
    )
    return TransformerLayer(config, parts).to(device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Of one call, of many in a row that nobody waits for; one warms up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    taken = time.perf_counter() - start
    wait()
    return taken / REPEATS

"""Time and memory of one core attention at head dimension 512: FlexAttention against unfused ones.

    python benchmarks/core_attention.py --out runs/core_attention.json

Forward and backward of Megatron's own modules on one GPU, causal, fp16, taking turns: Megatron's
``DotProductAttention``, TransformerEngine's (if installed; at 512 it has its unfused path only) and
``FlexAttention``. What a module cannot do is reported as such.
"""

import json
import os
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from rich.console import Console

from megatron_helix.kernels.flex_attention import FlexAttention


def main(
    out: Annotated[Path, typer.Option(help="File of the results (JSON).")],
    lengths: Annotated[str, typer.Option(help="Sequence lengths.")] = "2048,8192",
    heads: int = 4,
    head_dim: int = 512,
    repeats: int = 20,
) -> None:
    """Measure every module at every length, print lines and write OUT."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    rows: list[dict[str, Any]] = []
    for length in map(int, lengths.split(",")):
        for name, attention in _modules(heads, head_dim).items():
            row = {"module": name, "length": length, "heads": heads, "head_dim": head_dim}
            try:
                row |= _measured(attention, length, heads, head_dim, repeats)
            except Exception as error:  # a kernel that does not compile or fit is a finding
                row["failed"] = str(error).strip().splitlines()[0][:300]
            rows.append(row)
            Console(width=150).print(row)
            torch.cuda.empty_cache()
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    out.write_text(json.dumps({**result, "source": "measured"}, indent=1) + "\n")
    dist.destroy_process_group()


def _modules(heads: int, head_dim: int) -> dict[str, torch.nn.Module]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        kv_channels=head_dim,
        attention_dropout=0.0,
        fp16=True,
        params_dtype=torch.float16,
        masked_softmax_fusion=False,
    )
    kinds: dict[str, Any] = {"Megatron unfused": DotProductAttention, "flex": FlexAttention}
    if find_spec("transformer_engine"):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        kinds["TransformerEngine"] = TEDotProductAttention
    return {
        name: kind(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        ).cuda()
        for name, kind in kinds.items()
    }


def _measured(
    attention: torch.nn.Module, length: int, heads: int, head_dim: int, repeats: int
) -> dict[str, Any]:
    tensors = [
        torch.randn(length, 1, heads, head_dim, device="cuda", dtype=torch.float16)
        for _ in range(4)
    ]
    *qkv, grad = tensors
    for tensor in qkv:
        tensor.requires_grad_()
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").triu(1)
    given = None if isinstance(attention, FlexAttention) else mask
    times: list[float] = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        output = attention(*qkv, given, attn_mask_type=AttnMaskType.causal)
        output.backward(grad.reshape(output.shape))
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        for tensor in qkv:
            tensor.grad = None
    counted = times[3:]
    return {
        "ms": statistics.median(counted),
        "ms_spread": [min(counted), max(counted)],
        "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
    }


if __name__ == "__main__":
    typer.run(main)

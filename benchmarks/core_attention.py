"""Every core attention in one table: time, memory and errors of one call.

    python benchmarks/core_attention.py --out runs/core_attention.json
    python benchmarks/core_attention.py --device cpu --shapes 1x4x256x64,1x4/2x256x64 --repeats 3

A shape is BATCH x HEADS[/QUERY GROUPS] x LENGTH x HEAD DIMENSION, causal. The arms, one by one:

* ``spec``: TransformerEngine's module, if it is installed, on the backend of ``--te-backend``, and
  with slices of the queries on slices of the keys, 2 and 4 of them;
* ``Megatron``: its own ``DotProductAttention``;
* ``prefix``: the module as it is, with all heads of a piece at once, and with the queries in 1, 2,
  4 and 8 pieces;
* ``flex``, ``ffpa``: as ``--helix-core-attention`` has them, where they can run, and
  ffpa-attn's kernels in Triton;
* ``SDPA`` and ``torch``: torch's fused call, and the formula.

Errors are those of output and of the gradients of query, key and value, relative to the same inputs
in single precision (in double for single). Memory is the highest use beside what goes in; a CPU
does not tell. What an arm cannot do is reported as such.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from megatron_helix.upstream import cpu_device

SHAPES = (
    "8x16x2048x512,2x16x4096x512,1x16x8192x512,1x16x16384x512,4x16/2x2048x512,"
    "8x16x2048x256,8x16x2048x128"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = {"unfused": "001", "auto": "111"}  # NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN
Attend = Callable[..., torch.Tensor]


def main(
    out: Annotated[Path | None, typer.Option(help="File of the results (JSON).")] = None,
    shapes: Annotated[str, typer.Option(help="Shapes, with commas.")] = SHAPES,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    te_backend: Annotated[str, typer.Option(help="unfused or auto.")] = "unfused",
    only: Annotated[str, typer.Option(help="Arms, with commas; all by default.")] = "",
    repeats: int = 9,
) -> None:
    """Measure every arm at every shape, print a table of each and write OUT."""
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    os.environ.update(zip(names, BACKENDS[te_backend], strict=True))
    if device == "cpu":
        cpu_device.enable()
    from megatron_helix.planner import core_timing  # after the environment that kernels read

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    console, rows = Console(width=150), []
    with core_timing.alone():
        for shape in map(_shape, shapes.split(",")):
            given = core_timing.inputs(shape, DTYPES[dtype], device)
            exact = _exact(*given)
            table = Table(*_COLUMNS, title=f"{dict(shape._asdict())}, {dtype}")
            for name, make in _arms(shape, DTYPES[dtype]):
                if only and name not in only.split(","):
                    continue
                row: dict[str, Any] = {"arm": name, **shape._asdict(), "dtype": dtype}
                try:
                    attend = make()
                    row |= core_timing.taken(attend, given, repeats)._asdict()
                    row["errors"] = _errors(attend, given, exact)
                except Exception as error:  # a kernel that does not compile or fit is a finding
                    row["failed"] = (str(error).strip() or repr(error)).splitlines()[0][:200]
                rows.append(row)
                table.add_row(*_cells(row))
                if device == "cuda":
                    torch.cuda.empty_cache()
            console.print(table)
            if out:  # after every shape: a limit of time may end it
                card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
                result = {"device": card, "torch": torch.__version__, "te_backend": te_backend}
                result |= {"source": "measured", "rows": rows}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


def _shape(words: str) -> Any:
    from megatron_helix.planner.core_timing import Shape

    batch, heads, length, channels = words.split("x")
    heads, _, groups = heads.partition("/")
    return Shape(int(batch), int(heads), int(groups or heads), int(length), int(channels))


def _arms(shape: Any, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """Names, and what makes a call of each."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_helix.layers.layer_spec import CORE_ATTENTIONS
    from megatron_helix.options.core_attention import able
    from megatron_helix.planner import core_timing

    def module(kind: Any, **attributes: Any) -> Callable[[], Attend]:
        def make() -> Attend:
            core = core_timing.build(kind, shape, dtype)
            for name, value in attributes.items():
                setattr(core, name, value)
            return core_timing.causal_call(core)

        return make

    spec = core_timing.spec_core()
    if spec is not DotProductAttention:
        yield "spec", module(spec)
        for pieces in (2, 4):
            yield f"spec {pieces}", partial(_sliced, spec, shape, dtype, pieces)
    yield "Megatron", module(DotProductAttention)
    prefix = CORE_ATTENTIONS["prefix"]
    yield "prefix", module(prefix)
    yield "prefix undivided", module(prefix, scores=2**62)
    for pieces in (1, 2, 4, 8):
        yield f"prefix {pieces}", module(prefix, least=-(-shape.length // pieces), most=pieces)
    for name in able(shape.channels, on_cpu=cpu_device.is_enabled()):
        if name != "prefix":
            yield name, module(CORE_ATTENTIONS[name])
        if name == "ffpa":
            yield "ffpa Triton", lambda: _ffpa_triton
    yield "SDPA", lambda: _sdpa
    yield "torch", lambda: _formula


def _sliced(kind: Any, shape: Any, dtype: torch.dtype, pieces: int) -> Attend:
    """Queries in slices, each on a slice of the keys, as autograd sees them."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_helix.planner import core_timing

    core, size = core_timing.build(kind, shape, dtype), -(-shape.length // pieces)
    aligned = {"attn_mask_type": AttnMaskType.causal_bottom_right}

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ends = range(size, query.size(0) + size, size)
        return torch.cat(
            [core(query[end - size : end], key[:end], value[:end], None, **aligned) for end in ends]
        )

    return attend


def _ffpa_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from ffpa_attn import ffpa_attn_func  # type: ignore[import-not-found]

    grouped = query.size(2) != key.size(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = ffpa_attn_func(
        query, key, value, is_causal=True, enable_gqa=grouped, backend="triton"
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    grouped = query.size(2) != key.size(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=grouped
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def _formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    shared = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).to(wide).softmax(-1).to(query.dtype)
    return (weights @ value).permute(2, 0, 1, 3).flatten(2)


def _exact(*given: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in a wider precision, a query group of a sequence at a time."""
    wide = torch.float64 if given[0].dtype == torch.float32 else torch.float32
    query, key, value, grad = (x.detach().to(wide) for x in given)
    grad = grad.view(*query.shape[:3], -1)
    shared = query.size(2) // key.size(2)
    found = [torch.empty_like(x) for x in (grad, query, key, value)]
    for sequence in range(query.size(1)):
        for group in range(key.size(2)):
            one = (slice(None), slice(sequence, sequence + 1))
            rows, keys = (*one, slice(group * shared, (group + 1) * shared)), (*one, [group])
            leaves = [x.clone().requires_grad_() for x in (query[rows], key[keys], value[keys])]
            output = _formula(*leaves)
            grads = torch.autograd.grad(output, leaves, grad[rows].flatten(2))
            parts = (output.detach().view(found[0][rows].shape), *grads)
            for whole, place, part in zip(found, (rows, rows, keys, keys), parts, strict=True):
                whole[place] = part
    found[0] = found[0].flatten(2)
    return found


def _errors(attend: Attend, given: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    *qkv, grad = given
    output = attend(*qkv)
    made = (output.detach(), *torch.autograd.grad(output, qkv, grad))
    return [
        float((one.to(whole) - whole).norm() / whole.norm())
        for one, whole in zip(made, exact, strict=True)
    ]


_COLUMNS = ("arm", "forward ms", "forward + backward ms", "peak GB", "errors: output, dQ, dK, dV")


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["arm"], row["failed"], "", "", ""]
    times = (f"{row[name]:.3f}" for name in ("forward_ms", "training_ms"))
    errors = ", ".join(f"{error:.1e}" for error in row["errors"])
    return [row["arm"], *times, f"{row['memory_gb']:.2f}", errors]


if __name__ == "__main__":
    typer.run(main)

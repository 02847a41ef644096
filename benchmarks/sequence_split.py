"""Core attention of a sequence split on one GPU, rank after rank of the dim group: time and errors.

    python benchmarks/sequence_split.py --out runs/sequence_split.json
    python benchmarks/sequence_split.py --documents 9000,23000,768

What other ranks would send is there already: no collective is timed. The arms:

* ``whole``: all tokens in one call, as data parallelism has them; times are divided by m;
* ``prefixes``: keys and values of all tokens gathered, a late piece in calls of 2,048 queries;
* ``gaps``: keys and values of a rank's own tokens, those of others call by call, merged.

Of each the rank that takes longest counts, since ranks wait for each other. Errors are those of
output and of the gradients of query, key and value of a shorter row, beside single precision.

``gaps`` needs a kernel that gives its log-sum-exp away, TransformerEngine's on a GPU; elsewhere it
is left out, and the table says so. The script has not been run on a GPU; a test runs all arms on
the CPU, with a stand-in for that kernel.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from rich.console import Console
from rich.table import Table

from megatron_helix.exchange.packed import share_of
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.prefix import prefix_pieces
from megatron_helix.exchange.tokens import chunk_positions
from megatron_helix.kernels import engine_attention, gap_attention
from megatron_helix.kernels.collectives import UnderWay
from megatron_helix.kernels.document_attention import DocumentAttention
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.planner import core_timing
from megatron_helix.planner.core_timing import Shape
from megatron_helix.upstream import cpu_device

Tensors = list[torch.Tensor]
NO_KERNEL = "left out: no kernel here gives its log-sum-exp away; TransformerEngine's do, on a GPU"


def main(
    out: Annotated[Path | None, typer.Option(help="File of the results (JSON).")] = None,
    shape: Annotated[str, typer.Option(help="HEADS/QUERY GROUPS x LENGTH x CHANNELS.")] = (
        "28/4x32768x128"
    ),
    short: Annotated[int, typer.Option(help="Length of the row whose errors are taken.")] = 4096,
    documents: Annotated[str, typer.Option(help="Lengths in a packed row, with commas.")] = "",
    m: Annotated[int, typer.Option(help="Ranks of the dim group.")] = 2,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    repeats: int = 5,
) -> None:
    """Measure the arms, print a table and write OUT."""
    if device == "cpu":
        cpu_device.enable()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29512")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    heads, length, channels = shape.split("x")
    lengths = [int(word) for word in documents.split(",") if word] or [int(length)]
    heads, groups = heads.split("/")
    size = Shape(1, int(heads), int(groups), sum(lengths), int(channels))
    rows = measured(size, lengths, short, m, device, packs=bool(documents), repeats=repeats)
    dist.destroy_process_group()
    table = Table("arm", "forward ms", "forward + backward ms", "errors: output, dQ, dK, dV")
    for row in rows:
        times = (
            f"{row[name]:.3f}" if name in row else "" for name in ("forward_ms", "training_ms")
        )
        errors = ", ".join(f"{error:.1e}" for error in row.get("errors", ()))
        table.add_row(row["arm"], *times, row.get("failed", errors))
    Console(width=150).print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"source": "measured", "lengths": lengths, "rows": rows}) + "\n")


def measured(
    size: Shape, lengths: list[int], short: int, m: int, device: str, *, packs: bool, repeats: int
) -> list[dict[str, Any]]:
    """Every arm's time, and the errors of a row of ``short`` tokens, in a process group."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    with core_timing.alone():
        for arm, call, given in _arms(size, lengths, packs, m, dtype, device):
            row: dict[str, Any] = {"arm": arm}
            try:
                row |= core_timing.taken(call, given, repeats)._asdict()
            except Exception as error:  # a kernel that does not take it is a finding
                row["failed"] = (str(error).strip() or repr(error)).splitlines()[0][:200]
            rows.append(row)
        if not any(row["arm"].startswith("gaps") for row in rows):
            rows.append({"arm": "gaps", "failed": NO_KERNEL})
        size = size._replace(length=short)
        for arm, errors in _errors(size, _shortened(lengths, short), packs, m, dtype, device):
            rows.append({"arm": arm, "errors": errors})
    return rows


def _shortened(lengths: list[int], tokens: int) -> list[int]:
    """Documents in the same proportion, of so many tokens in all."""
    ends = [end * tokens // sum(lengths) for end in (0, *accumulate(lengths))]
    return [b - a for a, b in pairwise(ends) if b > a]


class _Ranks:
    """The ranks of a dim group, one after the other on one device."""

    def __init__(
        self, shape: Shape, lengths: list[int], packs: bool, m: int, dtype: torch.dtype, device: str
    ):
        self.shape, self.m, self.device = shape, m, torch.device(device)
        self.layout = HelixLayout(
            m=m,
            n=1,
            num_attention_heads=shape.heads,
            num_query_groups=shape.groups,
            kv_channels=shape.channels,
        )
        ends = (0, *accumulate(lengths))
        self.plan = Plan(exchange="weights", split="sequence", documents=ends if packs else ())
        self.packed = None
        if packs:
            cu = torch.tensor(ends, dtype=torch.int32, device=device)
            longest = {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
            self.packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, **longest
            )
        kind: Any = core_timing.spec_core()
        if packs and kind is DotProductAttention:  # which refuses packed documents
            kind = DocumentAttention
        self.core = core_timing.build(prefix_pieces(kind), shape, dtype)
        self.core.helix_layout = self.layout
        self.sent: dict[int, torch.Tensor] = {}
        self.in_parts = engine_attention.kernel_of(self.core) is not None

    def rows(self, rank: int) -> torch.Tensor:
        """Of the sequence, those of a rank."""
        known = {"documents": self.plan.documents}
        return chunk_positions(self.layout, rank, self.shape.length, **known).to(self.device)

    def whole(self, *qkv: torch.Tensor) -> torch.Tensor:
        """All tokens in one call."""
        self.core.plan = Plan(exchange="weights", split="batch")
        return self._call(qkv, self.packed)

    def prefixes(self, rank: int) -> Callable[..., torch.Tensor]:
        """Queries of a rank, keys and values of all."""
        share = self.packed and share_of(self.packed, self.plan, self.layout, rank, self.device)
        return lambda *qkv: self._as(rank, qkv, share)

    def gaps(self, rank: int, keys: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Queries, keys and values of a rank; ``keys``, of all, ``[m, 2, t, 1, K, d]``."""
        share = self.packed and share_of(
            self.packed, self.plan, self.layout, rank, self.device, by_gaps=True
        )

        def call(*qkv: torch.Tensor) -> torch.Tensor:
            return self._as(rank, qkv, share)

        if self.packed is not None:
            keys = keys.squeeze(3)
        self.gathered = keys
        return call

    @contextmanager
    def exchanged(self, rank: int) -> Iterator[None]:
        """Collectives whose results are there."""

        def gathered(*_: Any, **__: Any) -> UnderWay:
            return UnderWay(self.gathered, None)

        def exchanged(sent: torch.Tensor, *_: Any, **__: Any) -> UnderWay:
            self.sent[rank] = sent
            return UnderWay(torch.zeros_like(sent), None)

        with (
            mock.patch.object(gap_attention, "start_gather", gathered),
            mock.patch.object(gap_attention, "start_exchange", exchanged),
        ):
            yield

    def _as(self, rank: int, qkv: Any, share: Any) -> torch.Tensor:
        self.core.plan = self.plan
        dim = SimpleNamespace(size=lambda: self.m)
        self.core.helix_groups = SimpleNamespace(segment=rank, dim=dim, home=dim)
        return self._call(qkv, share)

    def _call(self, qkv: Any, packed: Any) -> torch.Tensor:
        if packed is not None:
            qkv = [x.squeeze(1) for x in qkv]
        made = self.core(*qkv, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
        return made.view(len(qkv[0]), 1, -1)


def _arms(
    shape: Shape, lengths: list[int], packs: bool, m: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[..., torch.Tensor], Tensors]]:
    """Name, call, and what it is given."""
    ranks = _Ranks(shape, lengths, packs, m, dtype, device)
    query, key, value, grad = core_timing.inputs(shape, dtype, device)
    yield f"whole, for {m} ranks", ranks.whole, [query, key, value, grad]
    keys = _by_rank(ranks, key, value)
    for rank in range(m):
        mine, of_grad = (x.detach()[ranks.rows(rank)] for x in (query, grad))
        given = [mine.requires_grad_(), key, value, of_grad]
        yield f"prefixes, rank {rank}", ranks.prefixes(rank), given
        if not ranks.in_parts:
            continue
        own = [x.detach().requires_grad_() for x in (mine, *keys[rank])]
        with ranks.exchanged(rank):
            yield f"gaps, rank {rank}", ranks.gaps(rank, keys), [*own, of_grad]


def _by_rank(ranks: _Ranks, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a gather makes of keys and values: ``[m, 2, t, 1, K, d]``."""
    both = torch.stack([key.detach(), value.detach()])
    return torch.stack([both[:, ranks.rows(rank)] for rank in range(ranks.m)])


def _errors(
    shape: Shape, lengths: list[int], packs: bool, m: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, list[float]]]:
    """Of all ranks together, relative to a wider precision."""
    ranks = _Ranks(shape, lengths, packs, m, dtype, device)
    query, key, value, grad = core_timing.inputs(shape, dtype, device)
    exact = _exact([query, key, value], grad, lengths if packs else [shape.length])

    def relative(found: Tensors) -> list[float]:
        pairs = zip(found, exact, strict=True)
        return [float((one.detach() - whole).norm() / whole.norm()) for one, whole in pairs]

    output = ranks.whole(query, key, value)
    qkv = (query, key, value)
    yield "errors, whole", relative([output, *torch.autograd.grad(output, qkv, grad)])
    if not ranks.in_parts:
        return
    keys = _by_rank(ranks, key, value)
    found = [torch.zeros_like(x, dtype=exact[0].dtype) for x in exact]
    for rank in range(m):
        rows = ranks.rows(rank)
        own = [x.detach().requires_grad_() for x in (query[rows], *keys[rank])]
        with ranks.exchanged(rank):
            output = ranks.gaps(rank, keys)(*own)
            made = torch.autograd.grad(output, own, grad[rows])
        for total, one in zip(found, (output, *made), strict=True):
            total[rows] += one.detach()
    for sent in ranks.sent.values():
        for rank in range(m):
            for total, part in zip(found[2:], sent[rank], strict=True):
                total[ranks.rows(rank)] += part.view(len(part), *total.shape[1:])
    yield "errors, gaps", relative(found)


def _exact(qkv: Tensors, grad: torch.Tensor, lengths: list[int]) -> Tensors:
    """Output and gradients in a wider precision, document by document and group by group."""
    wide = torch.float64 if grad.dtype == torch.float32 else torch.float32
    query, key, value = (x.detach().to(wide) for x in qkv)
    grad = grad.to(wide).view(query.shape)
    found = [torch.zeros_like(x) for x in (query, query, key, value)]
    shared, end = query.size(2) // key.size(2), 0
    for length in lengths:
        rows, end = slice(end, end + length), end + length
        hidden = torch.ones(length, length, dtype=torch.bool, device=grad.device).triu(1)
        for group in range(key.size(2)):
            heads = slice(group * shared, (group + 1) * shared)
            leaves = [
                x.clone().requires_grad_()
                for x in (query[rows, 0, heads], key[rows, 0, group], value[rows, 0, group])
            ]
            scores = torch.einsum("qhd,kd->hqk", leaves[0], leaves[1]) * query.size(-1) ** -0.5
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            output = torch.einsum("hqk,kd->qhd", weights, leaves[2])
            grads = torch.autograd.grad(output, leaves, grad[rows, 0, heads])
            for total, one in zip(found, (output.detach(), *grads), strict=True):
                total[rows, 0, heads if one.dim() == 3 else group] = one
    return [found[0].flatten(2), *found[1:]]


if __name__ == "__main__":
    typer.run(main)

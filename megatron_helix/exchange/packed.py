"""Packed rows under helix: what of their documents a rank has, and what it attends to.

A row of documents (THD) is one sequence for the residual stream, dealt over the dim group by
:mod:`megatron_helix.exchange.dealing`. Rank (i, j) has some runs of neighbouring tokens, each of
one document, and gathered over the dim group the keys and values of the whole row. A run attends to
its document up to its own end: for the core attention, a document of as many queries and more keys,
aligned at their ends.

The keys of all runs are laid one behind the other, as kernels for packed rows want them. Of a
document in one chunk of n a rank has an early and a late piece, whose prefixes are together
``1 + 1/2m`` times the document; one that spans more chunks is there once for each, and so is one
whose piece is long enough to be attended to in several calls. On two H200, where
TransformerEngine attends, rows trained this way; there they were not compared with stock's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.dealing import Run
from megatron_helix.exchange.gaps import gaps_of
from megatron_helix.exchange.pieces import Piece
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.tokens import in_calls, runs_of
from megatron_helix.kernels.copies import on_device
from megatron_helix.kernels.gap_attention import Gaps
from megatron_helix.partition.layout import HelixLayout

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class _MaskType(Enum):
    """TransformerEngine's name for packed queries at the ends of longer keys; Megatron has none."""

    padding_causal_bottom_right = 1


@dataclass
class Share(PackedSeqParams):
    """What a rank has of a packed row, in the place of Megatron's parameters.

    The queries are one document, since each comes with a rotary frequency of its own; the keys are
    the row's documents.

    Attributes:
        positions: of the row, those of my tokens, ascending: ``[t/m]``.
        in_documents: the same, counted from the beginning of their documents.
        prefixes: of the row, the keys that each of my runs attends to, run after run.
        rounds: of ``prefixes``, those that are all different: which, and the keys they are.
        attended: my runs and their prefixes, as packed documents.
        gaps: in the place of the last three, the calls of a rank that has keys of its own tokens.
    """

    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    in_documents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    prefixes: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    attended: PackedSeqParams = field(default_factory=PackedSeqParams)
    gaps: Gaps | None = None


def share_of(
    packed: PackedSeqParams,
    plan: Plan,
    layout: HelixLayout,
    segment: int,
    device: torch.device,
    *,
    by_gaps: bool = False,
) -> Share:
    """What dim rank ``segment`` has of a row; the same for all layers, and made once.

    On the ``device`` of its tokens, wherever ``cu_seqlens_q`` is. ``by_gaps`` says whether the keys
    beside the queries are those of the same tokens (:mod:`megatron_helix.exchange.gaps`).
    """
    known = getattr(packed, "helix_share", None)
    asked = plan, layout, segment, device, by_gaps
    if known is None or known[0] != asked:
        known = asked, (_with_gaps if by_gaps else _with_prefixes)(packed, *asked[:-1])
        packed.helix_share = known
    return known[1]


def _with_gaps(
    packed: PackedSeqParams, plan: Plan, layout: HelixLayout, segment: int, device: torch.device
) -> Share:
    tokens = plan.documents[-1]
    mine = torch.tensor([0, tokens // layout.m], dtype=torch.int32)
    ends = on_device(mine, device)
    share = _rows(packed, runs_of(plan, layout, segment, tokens), device)
    share.cu_seqlens_q = share.cu_seqlens_kv = ends
    share.gaps = gaps_of(plan, layout, segment, tokens, device)
    return share


def _rows(packed: PackedSeqParams, runs: list[Run], device: torch.device) -> Share:
    """Where the tokens of some runs are."""
    starts, ends, documents = torch.tensor(runs).unbind(dim=1)
    positions = _laid(starts, ends - starts)
    return Share(
        qkv_format="thd",
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_kv,
        tokens_per_sample=packed.tokens_per_sample,
        positions=on_device(positions, device),
        in_documents=on_device(positions - documents.repeat_interleave(ends - starts), device),
    )


def _with_prefixes(
    packed: PackedSeqParams, plan: Plan, layout: HelixLayout, segment: int, device: torch.device
) -> Share:
    runs = [
        Run(part.start, part.end, run.document)
        for run in runs_of(plan, layout, segment, plan.documents[-1])
        for part in in_calls(Piece(run.start, run.end - run.start))
    ]
    share = _rows(packed, runs, device)
    starts, ends, documents = torch.tensor(runs).unbind(dim=1)
    prefixes = ends - documents
    # A document's runs in turn: the first of each, the second of each, ...
    before: Counter[int] = Counter()
    turn = []
    for run in runs:
        turn.append(before[run.document])
        before[run.document] += 1
    keys = _laid(documents, prefixes)
    turns = torch.tensor(turn).repeat_interleave(prefixes)
    rounds = []
    for k in range(max(turn) + 1):
        of_round = (turns == k).nonzero().squeeze(1)
        rounds.append((on_device(of_round, device), on_device(keys[of_round], device)))
    of_queries, of_keys = _ends(ends - starts), _ends(prefixes)
    share.cu_seqlens_q = on_device(of_queries[[0, -1]], device)
    share.cu_seqlens_kv = on_device(torch.tensor(plan.documents, dtype=torch.int32), device)
    share.prefixes, share.rounds = on_device(keys, device), tuple(rounds)
    share.attended = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device(of_queries, device),
        cu_seqlens_kv=on_device(of_keys, device),
        max_seqlen_q=int((ends - starts).max()),
        max_seqlen_kv=int(prefixes.max()),
    )
    return share


def _laid(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The numbers from every start on, one behind the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _ends(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


class _Prefixes(torch.autograd.Function):
    """Forward: the rows ``share.prefixes`` of x. Backward: their gradients added up.

    In fp32, rounded once, as a kernel that sees all queries does; round by round, in each of which
    no row is twice, so that every run gives the same sum. Saves the indices.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, share: Share) -> torch.Tensor:
        ctx.length, ctx.rounds = x.size(0), share.rounds
        return x.index_select(0, share.prefixes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        several = len(ctx.rounds) > 1
        wide = torch.promote_types(grad.dtype, torch.float32) if several else grad.dtype
        total = grad.new_zeros((ctx.length, *grad.shape[1:]), dtype=wide)
        for of_round, keys in ctx.rounds:
            total.index_add_(0, keys, grad.index_select(0, of_round).to(wide))
        return total.to(grad.dtype), None


@contextmanager
def fewer_queries_than_keys(core_attention: torch.nn.Module) -> Iterator[None]:
    """Tell TransformerEngine's unfused attention that documents may have more keys than queries.

    In self-attention it takes the queries' lengths for those of the keys, which it masks by them.
    """
    unfused = getattr(core_attention, "unfused_attention", None)
    if unfused is None:
        yield
        return
    kind, unfused.attention_type = unfused.attention_type, "cross"
    try:
        yield
    finally:
        unfused.attention_type = kind


def attend_to_documents(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    share: Share,
    attn_mask_type: AttnMaskType,
    **kwargs: Any,
) -> torch.Tensor:
    """My tokens' context: query ``[t/m, H/n, d]``, key and value ``[t, K/n, d]`` of the row.

    Args:
        attend: the core attention, which takes packed documents.
        query: in the order of ``share.positions``.
        key: in the order of the row.
        value: the same.
        share: what I have of the row.
        attn_mask_type: a causal one, as GPT's are.
        kwargs: what else the core attention takes.

    Raises:
        UserError: for a mask that is not causal.
    """
    if attn_mask_type not in _CAUSAL:
        raise UserError(
            "attn_mask_type: packed documents under --helix-m > 1 must be attended to causally, got"
            f" {attn_mask_type.name} from the layer spec; use a causal one, or --helix-m 1"
        )
    return attend(
        query,
        _Prefixes.apply(key, share),
        _Prefixes.apply(value, share),
        None,
        attn_mask_type=_MaskType.padding_causal_bottom_right,
        packed_seq_params=share.attended,
        **kwargs,
    )

"""What a rank has of a packed row, and the rows that are refused."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_helix.exchange import tokens
from megatron_helix.exchange.packed import (
    _Prefixes,
    document_ends,
    fewer_queries_than_keys,
    runs_of,
    share_of,
)
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice, packed_plan
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.layers.attention import document_frequencies
from tests.exchange.test_dealing import rows
from tests.exchange.test_tokens import layout_of
from tests.packed_case import params

SHAPE = BlockShape(hidden=64, ffn=256, gated=False, num_layers=2)


@given(rows())
def test_a_rank_attends_to_the_prefixes_of_its_tokens(
    row: tuple[int, int, tuple[int, ...]],
) -> None:
    m, n, ends = row
    layout = layout_of(m, n)
    packed = params([end - start for start, end in pairwise(ends)])
    assert document_ends(packed, ends[-1]) == ends
    for balanced in (True, False):
        plan = Plan(exchange="weights", split="sequence", balanced=balanced, documents=ends)
        for segment in range(m):
            share = share_of(packed, plan, layout, segment)
            runs = runs_of(plan, layout, segment)
            mine = [position for run in runs for position in range(run.start, run.end)]
            assert share.positions.tolist() == mine
            begins = [max(end for end in ends if end <= position) for position in mine]
            inside = [position - begin for position, begin in zip(mine, begins, strict=True)]
            assert share.in_documents.tolist() == inside
            keys = [key for run in runs for key in range(run.document, run.end)]
            assert share.prefixes.tolist() == keys
            assert share.attended.cu_seqlens_q.diff().tolist() == [r.end - r.start for r in runs]
            assert share.attended.cu_seqlens_kv.diff().tolist() == [
                run.end - run.document for run in runs
            ]
            for of_round, of_row in share.rounds:
                assert share.prefixes[of_round].tolist() == of_row.tolist()
                assert len(set(of_row.tolist())) == len(of_row)
            assert sum(len(of_round) for of_round, _ in share.rounds) == len(keys)


def test_long_runs_are_attended_to_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "QUERIES", 3)
    layout, ends = layout_of(2, 1), (0, 5, 28)
    plan = Plan(exchange="weights", split="sequence", documents=ends)
    for segment in range(2):
        share = share_of(params([5, 23]), plan, layout, segment)
        assert len(share.positions) == 14
        lengths, last = share.attended.cu_seqlens_q.diff(), share.attended.cu_seqlens_q[1:] - 1
        assert lengths.max() == share.attended.max_seqlen_q == 3
        assert torch.equal(share.attended.cu_seqlens_kv.diff(), share.in_documents[last] + 1)
        assert torch.equal(
            share.prefixes[share.attended.cu_seqlens_kv[1:] - 1], share.positions[last]
        )
        for of_round, of_row in share.rounds:
            assert torch.equal(share.prefixes[of_round], of_row)
            assert len(of_row.unique()) == len(of_row)


def test_gradients_of_prefixes_are_rounded_once() -> None:
    layout = layout_of(2, 2)
    plan = Plan(exchange="weights", split="sequence", documents=(0, 16))
    share = share_of(params([16]), plan, layout, 0)
    x = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    x.requires_grad_()
    gathered = _Prefixes.apply(x, share)
    assert torch.equal(gathered, x[share.prefixes])
    back = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    gathered.backward(back)
    total = torch.zeros(16, 2, 3).index_add_(0, share.prefixes, back.float())
    assert torch.equal(x.grad, total.bfloat16())


def test_a_share_is_made_once() -> None:
    packed, layout = params([5, 11]), layout_of(2, 2)
    plan = Plan(exchange="weights", split="sequence", documents=document_ends(packed, 16))
    assert share_of(packed, plan, layout, 1) is share_of(packed, plan, layout, 1)
    assert document_ends(packed, 16) is document_ends(packed, 16)


def test_unfused_attention_is_told_of_longer_keys_for_one_call() -> None:
    core = torch.nn.Module()
    with fewer_queries_than_keys(core):  # others than TransformerEngine's need not be told
        pass
    core.unfused_attention = torch.nn.Module()
    core.unfused_attention.attention_type = "self"
    with fewer_queries_than_keys(core):
        assert core.unfused_attention.attention_type == "cross"
    assert core.unfused_attention.attention_type == "self"


def test_rotary_positions_are_those_that_the_keys_get() -> None:
    """Of the row where Megatron counts so, which its fused kernel never does."""
    packed, layout = params([5, 11]), layout_of(2, 2)
    plan = Plan(exchange="weights", split="sequence", documents=(0, 5, 16))
    share = share_of(packed, plan, layout, 1)
    for length, fused, expected in (
        (11, False, share.in_documents),
        (16, False, share.positions),
        (16, True, share.in_documents),
    ):
        frequencies = torch.arange(length)
        query, key = document_frequencies(frequencies, share, plan, fused=fused)
        assert torch.equal(query, expected)
        assert key is frequencies


def with_ends(*ends: int, **fields: Any) -> PackedSeqParams:
    """Parameters of these ends."""
    given = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(
        **{"qkv_format": "thd", "cu_seqlens_q": given, "cu_seqlens_kv": given, **fields}
    )


OTHER = torch.tensor([0, 6, 16], dtype=torch.int32)
BAD = {
    "too short": (with_ends(0, 5, 12), "documents must add up to the row's 16 tokens, got .* 12;"),
    "too long": (with_ends(0, 5, 20), "documents must add up to the row's 16 tokens, got .* 20;"),
    "empty": (with_ends(0, 5, 5, 16), "document 1 must have a token or more, got .* from 5 to 5;"),
    "backwards": (with_ends(0, 9, 5, 16), "document 1 must have a token or more, got .* 9 to 5;"),
    "no beginning": (with_ends(3, 16), r"cu_seqlens_q must begin with 0 .*, got \[3, 16\];"),
    "none": (with_ends(0), r"cu_seqlens_q must begin with 0 and end a document or more, got \[0\]"),
    "other keys": (
        with_ends(0, 5, 16, cu_seqlens_kv=OTHER),
        r"cu_seqlens_kv must be equal to cu_seqlens_q .*, got \[0, 6, 16\] and \[0, 5, 16\];",
    ),
    "padding between": (
        with_ends(0, 5, 16, cu_seqlens_q_padded=OTHER),
        r"cu_seqlens_q_padded must be equal to cu_seqlens_q",
    ),
    "not in a row": (with_ends(0, 16, qkv_format="bshd"), "qkv_format must be thd, .* got 'bshd';"),
    "cut by ranks": (with_ends(0, 16, local_cp_size=2), "rows under --helix-m > 1 must be whole"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rows_are_refused(bad: str) -> None:
    packed, message = BAD[bad]
    with pytest.raises(ValueError, match=rf"^packed_seq_params: {message}") as refused:
        document_ends(packed, 16)
    assert "\n" not in str(refused.value)


def test_ends_may_be_given_twice_and_filled_up() -> None:
    ends = torch.tensor([0, 5, 16], dtype=torch.int32)
    padded = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends}
    assert document_ends(with_ends(0, 5, 16, **padded), 16) == (0, 5, 16)
    assert document_ends(with_ends(0, 5, 16, 16, 16), 16) == (0, 5, 16)


REFUSED = {
    "scores": (Choice(exchange="scores"), 16, "--helix-exchange: scores moves the scores of all"),
    "batch split": (Choice(split="batch"), 16, "--helix-split: batch deals out the sequences"),
    "cut by ranks": (Choice(keeps_sequences=True), 16, "--context-parallel-size: must be 1 where"),
    "length": (
        Choice(),
        18,
        r"--seq-length: packed rows must be a multiple of .* \(4\) tokens, got 18",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_packed_is_refused(what: str) -> None:
    choice, tokens, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"^{message}"):
        packed_plan(choice, layout_of(2, 2), SHAPE, tokens=tokens, sequence_parallel=True)


def test_a_packed_row_is_split_by_sequence() -> None:
    size = {"tokens": 16, "sequence_parallel": True}
    for exchange in ("activations", "weights"):
        plan = packed_plan(Choice(exchange=exchange), layout_of(2, 2), SHAPE, **size)
        assert (plan.exchange, plan.split) == (exchange, "sequence")
    in_order = replace(Choice(exchange="weights"), keeps_order="--some-flag")
    assert not packed_plan(in_order, layout_of(2, 2), SHAPE, **size).balanced

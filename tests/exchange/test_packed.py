"""What a rank has of a packed row, and the runs that have none."""

from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given

from megatron_helix.exchange import tokens
from megatron_helix.exchange.packed import (
    _Prefixes,
    fewer_queries_than_keys,
    share_of,
)
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice, packed_plan
from megatron_helix.exchange.tokens import runs_of
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.layers.rotary import document_frequencies
from tests.exchange.test_dealing import rows
from tests.exchange.test_tokens import layout_of
from tests.packed_case import params

CPU = torch.device("cpu")
SHAPE = BlockShape(hidden=64, ffn=256, gated=False, num_layers=2)


@given(rows())
def test_a_rank_attends_to_the_prefixes_of_its_tokens(
    row: tuple[int, int, tuple[int, ...]],
) -> None:
    m, n, ends = row
    layout = layout_of(m, n)
    packed = params([end - start for start, end in pairwise(ends)])
    for balanced in (True, False):
        plan = Plan(exchange="weights", split="sequence", balanced=balanced, documents=ends)
        for segment in range(m):
            share = share_of(packed, plan, layout, segment, CPU)
            runs = runs_of(plan, layout, segment, ends[-1])
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
        share = share_of(params([5, 23]), plan, layout, segment, CPU)
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
    share = share_of(params([16]), plan, layout, 0, CPU)
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
    plan = Plan(exchange="weights", split="sequence", documents=(0, 5, 16))
    assert share_of(packed, plan, layout, 1, CPU) is share_of(packed, plan, layout, 1, CPU)


def test_a_share_is_where_its_tokens_are() -> None:
    """Wherever the ends of the documents are, which are numbers by then."""
    plan = Plan(exchange="weights", split="sequence", documents=(0, 5, 16))
    share = share_of(params([5, 11]), plan, layout_of(2, 2), 1, torch.device("meta"))
    found = [share.positions, share.in_documents, share.prefixes, *chain(*share.rounds)]
    found += [share.cu_seqlens_q, share.cu_seqlens_kv]
    found += [share.attended.cu_seqlens_q, share.attended.cu_seqlens_kv]
    assert {tensor.device.type for tensor in found} == {"meta"}


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
    share = share_of(packed, plan, layout, 1, CPU)
    for length, fused, expected in (
        (11, False, share.in_documents),
        (16, False, share.positions),
        (16, True, share.in_documents),
    ):
        frequencies = torch.arange(length)
        query, key = document_frequencies(frequencies, share, plan, fused=fused)
        assert torch.equal(query, expected)
        assert key is frequencies


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

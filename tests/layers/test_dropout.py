"""Dropout: what ranks hold in common is dropped alike, all else on its own.

Rates are held to six standard deviations of their binomial distribution: of a billion samples two
are further away. A mask that two heads or tokens share is some ten or hundred away.
"""

from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch

from tests.covering import fast
from tests.distributed import run_distributed
from tests.dropout_case import HEADS, RATE, B, Cut, S, Seen, run, whole_attention, whole_hidden

SIGMAS = 6.0
SP = {"sequence_parallel": True}
PLANS = {
    "stock": Cut(),
    "stock-sp": Cut(**SP),
    "activations-batch": Cut(m=2),
    "activations-batch-sp": Cut(m=4, **SP),
    "activations-sequence": Cut(m=4, split="sequence"),
    "activations-sequence-sp": Cut(m=2, split="sequence", **SP),
    "weights-batch-sp": Cut(m=2, exchange="weights", **SP),
    "weights-sequence-sp": Cut(m=2, exchange="weights", split="sequence", **SP),
    "activations-batch-prefix": Cut(m=2, core="prefix"),
    "weights-sequence-prefix-sp": Cut(
        m=2, exchange="weights", split="sequence", core="prefix", **SP
    ),
    "scores": Cut(m=2, exchange="scores", split="auto"),
    "scores-sp": Cut(m=2, exchange="scores", split="auto", **SP),
    "scores-of-one-head-group-sp": Cut(m=4, exchange="scores", split="auto", **SP),
}
RECOMPUTE = {"core_attn": ("core_attn",), "full": ("full",)}
RUNS = {  # what is run together
    "once": PLANS
    | {f"{name}-all-seen": replace(cut, causal=False) for name, cut in PLANS.items()}
    | {
        f"{name}-hidden": replace(cut, attention_rate=0.0)
        for name, cut in PLANS.items()
        if cut.sequence_parallel
    },
    **{
        what: {f"{name}-{what}": replace(cut, recompute=modules) for name, cut in PLANS.items()}
        for what, modules in RECOMPUTE.items()
    },
}
CUTS = {name: cut for cuts in RUNS.values() for name, cut in cuts.items()}
HELIX = [name for name, cut in PLANS.items() if cut.m]


@cache
def seen(name: str) -> list[Seen]:
    """Of every rank."""
    (what,) = (what for what, cuts in RUNS.items() if name in cuts)
    return [of_rank[name] for of_rank in _seen_by_ranks(what)]


@cache
def _seen_by_ranks(what: str) -> list[dict[str, Seen]]:
    return run_distributed(run, 4, RUNS[what])


def attention(name: str) -> torch.Tensor:
    """The mask of the first layer's attention, ``[b, H, s, s]``."""
    return whole_attention(CUTS[name], [part.attention[0] for part in seen(name)])


def hidden(name: str) -> torch.Tensor:
    """The masks of the stream, ``[2 * layers, s, b, D]``."""
    return whole_hidden(CUTS[name], [part.hidden for part in seen(name)])


def assert_rate(kept: torch.Tensor, expected: float) -> None:
    """The share of true elements is the expected one, to within six standard deviations."""
    deviation = (expected * (1 - expected) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - expected) <= SIGMAS * deviation


def assert_independent(masks: torch.Tensor) -> None:
    """Any two of ``[masks, elements]`` agree as often as masks drawn apart do."""
    signs = masks.double() * 2 - 1
    agree = (signs @ signs.T / masks.size(1) + 1) / 2
    expected = RATE**2 + (1 - RATE) ** 2
    deviation = (expected * (1 - expected) / masks.size(1)) ** 0.5
    off = (agree - expected).abs().fill_diagonal_(0)
    assert off.max() <= SIGMAS * deviation, f"{divmod(int(off.argmax()), len(masks))} share a mask"


@pytest.mark.parametrize("name", PLANS)
def test_what_is_kept_is_the_rate_s_share_and_is_scaled_up_by_it(name: str) -> None:
    visible = torch.ones(S, S, dtype=torch.bool).tril()
    assert_rate(attention(name)[..., visible], 1 - RATE)
    assert not attention(name)[..., ~visible].any()
    for mask in hidden(name):
        assert_rate(mask, 1 - RATE)
    for part in seen(name):
        for scale in part.scale:
            torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_no_two_heads_or_tokens_share_a_mask(name: str) -> None:
    """Of tokens, those of another sequence or of another of T chunks: what ranks may divide."""
    visible = torch.ones(S, S, dtype=torch.bool).tril()
    assert_independent(attention(name)[..., visible].flatten(0, 1))
    chunks = attention(f"{name}-all-seen").view(B * HEADS * 4, -1)
    assert_independent(chunks)


@pytest.mark.parametrize("name", PLANS)
def test_the_stream_is_dropped_apart_from_attention_and_other_tokens(name: str) -> None:
    """And each pass from the one before.

    In the order in which they were drawn, as masks from generators of one seed would agree.
    """
    for part in seen(f"{name}-all-seen"):
        drawn = [*part.hidden, part.attention[0], part.later]
        length = min(mask.numel() for mask in drawn)
        assert_independent(torch.stack([mask.flatten()[:length] for mask in drawn]))
    tokens = hidden(name).unflatten(1, (4, -1)).transpose(2, 3)  # [masks, T, b, s/T, D]
    assert_independent(tokens.flatten(0, 2).flatten(1))


@pytest.mark.parametrize("name", [name for name in PLANS if not name.endswith("-sp")])
def test_a_stream_that_all_ranks_hold_is_dropped_as_in_stock(name: str) -> None:
    expected = seen("stock")[0]
    for part in seen(name):
        assert torch.equal(part.hidden, expected.hidden)
        assert torch.equal(part.state, expected.state)  # and so will be in the next layer, or step


@pytest.mark.parametrize("name", [name for name in HELIX if name.endswith("-sp")])
def test_a_stream_that_is_cut_is_dropped_as_in_stock_without_attention_dropout(name: str) -> None:
    """But for ``weights``, where a rank holds other tokens."""
    same = torch.equal(hidden(f"{name}-hidden"), hidden("stock-sp-hidden"))
    assert same == (not name.startswith("weights"))


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("scores")])
def test_the_ranks_of_a_dim_group_drop_the_same_scores(name: str) -> None:
    layout = CUTS[name].layout
    assert layout is not None
    masks = [part.attention[0] for part in seen(name)]
    for rank, other in combinations(range(4), 2):
        same_heads = layout.coordinates(rank)[0] == layout.coordinates(other)[0]
        assert torch.equal(masks[rank], masks[other]) == same_heads


@pytest.mark.parametrize("what", fast(["core_attn"], RECOMPUTE))
@pytest.mark.parametrize("name", PLANS)
def test_what_is_recomputed_is_dropped_again(name: str, what: str) -> None:
    for part, without in zip(seen(f"{name}-{what}"), seen(name), strict=True):
        assert len(part.attention) == 2
        for mask in part.attention:
            assert torch.equal(mask, without.attention[0])
        assert torch.equal(part.hidden, without.hidden)
        assert torch.equal(part.gradient, without.gradient)
        assert torch.equal(part.state, without.state)

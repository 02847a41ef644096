"""Prefill and decode on a cache that is cut m x n: stock's tokens and logits, 1/T of its memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.exchange import decode, strategy, traffic
from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.transformer_layer import block_shape
from megatron_helix.partition.layout import HelixLayout
from tests.covering import THOROUGH, covering
from tests.distributed import run_distributed
from tests.inference.decode_case import (
    BATCHES,
    FFN,
    MODELS,
    NEW_TOKENS,
    VOCABULARY,
    Layout,
    Model,
    Result,
    generate,
    helix,
    prompts,
)

# Logits are of order one; a roundoff of 6e-8 and sums over a hundred terms in another order.
LOGIT_TOLERANCE = 1e-5

Stock = Callable[[str], list[Result]]


@pytest.fixture(scope="module")
def stock() -> Stock:
    """One stock rank, once for each model."""
    runs: dict[str, list[Result]] = {}

    def run(name: str) -> list[Result]:
        if name not in runs:
            (runs[name],) = run_distributed(generate, 1, MODELS[name], Layout(), BATCHES)
        return runs[name]

    return run


def _cases() -> list[tuple[str, Layout]]:
    sp = {"sequence_parallel": True}
    cases = [
        (name, helix(m, n, split=split))
        for name, m, n in [("mha", 2, 2), ("mha", 4, 1), ("gqa", 2, 2), ("mqa", 4, 1)]
        for split in ("auto", "sequence")
    ]
    return [
        *cases,
        ("mha", helix(1, 4)),
        ("mha", helix(2, 2, exchange="scores")),
        ("mqa", helix(4, 1, exchange="scores", **sp)),
        ("mha", helix(2, 2, exchange="weights", **sp)),
        ("mha", helix(4, 1, exchange="weights", split="sequence", **sp)),
        ("mqa", helix(4, 1, exchange="auto", **sp)),
        ("gated", helix(3, 2)),  # eight rotary pairs in three segments: tiles are padded
        ("gated", helix(2, 2)),
        ("gated", helix(4, 1, split="sequence", **sp)),
        ("sink", helix(3, 1, split="sequence", batches=(8,))),  # sixteen channels in three
        ("sink", helix(2, 2)),
        ("sink", helix(2, 2, split="sequence", **sp)),
        ("off_by_one", helix(2, 2, split="sequence")),
        *(("window", helix(2, 2, split=split)) for split in ("sequence", "auto")),
        ("window", helix(3, 1, exchange="scores")),
        ("window", helix(4, 1, exchange="scores")),
        ("gqa", helix(3, 1, exchange="weights", **sp)),
        ("window", helix(2, 2, split="sequence", core="flex", **sp)),
        ("gqa", helix(2, 2, core="flex", **sp)),
        ("gqa", helix(4, 1, split="sequence", core="prefix", **sp)),
        ("gqa_16_2", helix(4, 2, batches=(3,))),  # the fast suite's
        ("gqa_16_2", helix(4, 2)),
        ("gqa_16_2", helix(8, 2)),
        ("gqa_16_2", helix(8, 2, exchange="weights", **sp)),
        ("gqa_16_2", helix(8, 2, exchange="scores", batches=(3,))),
    ]


def _name(value: Any) -> str | None:
    if not isinstance(value, Layout):
        return None
    sp = "-sp" if value.sequence_parallel else ""
    core = "" if value.core == "spec" else f"-{value.core}"
    return f"{value.m}x{value.n}-{value.exchange}-{value.split}{sp}{core}"


@pytest.mark.parametrize(("name", "layout"), covering(_cases(), of=(0,)), ids=_name)
def test_decode_is_as_stock(stock: Stock, name: str, layout: Layout) -> None:
    """Tokens, logits at every step, the memory of the cache, and the bytes of every step."""
    model = MODELS[name]
    whole = [stock(name)[BATCHES.index(batch)] for batch in layout.batches]
    ranks = run_distributed(generate, layout.tp, model, layout, layout.batches)
    for batch, expected, *found in zip(layout.batches, whole, *ranks, strict=True):
        split = layout.split
        if layout.exchange == "scores":
            split = "none"
        elif split == "auto":
            split = strategy.cache_split(Choice(), layout.partition(model), batch)
        assert sum(result.cache_bytes for result in found) == expected.cache_bytes
        for rank, result in enumerate(found):
            where = f"batch {batch}, rank {rank}"
            assert torch.equal(result.tokens, expected.tokens), where
            assert_close(result.logits, expected.logits, where)
            if split != "none":  # where a rank holds a segment, they need not be alike
                assert result.cache_bytes * layout.tp == expected.cache_bytes, where
            if "qk_layernorm" not in model.more or split != "none":
                assert_sends(result, model, layout, split, batch)


def assert_close(found: list[Any], expected: list[Any], where: str) -> None:
    """Logits of every step."""
    assert len(found) == len(expected)
    for step, (logits, reference) in enumerate(zip(found, expected, strict=True)):
        error = (logits - reference).abs().max() / reference.abs().max()
        assert error <= LOGIT_TOLERANCE, f"{where}, step {step}: off by {error:.1e}"


def assert_sends(result: Result, model: Model, layout: Layout, split: str, batch: int) -> None:
    """The closed form at every step: of the context it depends for scores only."""
    shape = block_shape(
        TransformerConfig(
            num_layers=2, hidden_size=64, ffn_hidden_size=FFN, num_attention_heads=model.heads
        )
    )
    start = min(map(len, prompts(batch)))
    if split != "none":
        assert all(sent == result.step_bytes[0] for sent in result.step_bytes)
    for step, sent in enumerate(result.step_bytes):
        expected = traffic.decode_bytes(
            split,
            layout.partition(model),
            shape,
            batch=batch,
            vocabulary=VOCABULARY,
            element_bytes=4,
            positions=start + step + 1,
        )
        assert {key: count for key, count in sent.items() if count} == expected


@pytest.mark.parametrize("name", MODELS)
def test_models_say_something(stock: Stock, name: str) -> None:
    """A model that repeats one token, or what another model says, would agree with too much."""
    said = [tuple(row[-NEW_TOKENS:].tolist()) for row in stock(name)[-1].tokens]
    assert len(set(said)) == len(said)
    assert len({token for row in said for token in row}) > NEW_TOKENS
    others = [other for other in MODELS if other != name]
    assert all(not torch.equal(stock(name)[-1].tokens, stock(o)[-1].tokens) for o in others)


@pytest.mark.parametrize("batch", [0, 1], ids=["one", "three"])
def test_stock_keeps_replicas_where_there_are_fewer_groups_than_ranks(
    stock: Stock, batch: int
) -> None:
    """What helix does away with: a stock rank holds 1/K of the cache, not 1/T."""
    ranks = run_distributed(generate, 4, MODELS["gqa"], Layout(tp=4), BATCHES[:2])
    for found in ranks:
        assert torch.equal(found[batch].tokens, stock("gqa")[batch].tokens)
        assert found[batch].cache_bytes * 2 == stock("gqa")[batch].cache_bytes


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tp=2, pp=2), marks=THOROUGH),
        Layout(tp=2, pp=2, microbatches=4, sequence_parallel=True),
        Layout(tp=1, pp=2, microbatches=2),
        pytest.param(Layout(tp=2, pp=2, m=2, n=1, microbatches=2), marks=THOROUGH),
        Layout(tp=2, pp=2, m=2, n=1, microbatches=8, sequence_parallel=True),
    ],
    ids=lambda layout: f"tp{layout.tp}-m{layout.m}-{layout.microbatches}",
)
def test_a_pipeline_says_the_same(stock: Stock, layout: Layout) -> None:
    ranks = run_distributed(generate, layout.tp * layout.pp, MODELS["mha"], layout, (8,))
    for rank, (found,) in enumerate(ranks):
        if rank < layout.tp or rank >= layout.tp * (layout.pp - 1):
            assert torch.equal(found.tokens, stock("mha")[-1].tokens), f"rank {rank}"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tp=4, ep=4, sequence_parallel=True), marks=THOROUGH, id="stock"),
        pytest.param(helix(2, 2, ep=4, sequence_parallel=True), id="helix"),
    ],
)
def test_experts_on_all_ranks_say_the_same(stock: Stock, layout: Layout) -> None:
    ranks = run_distributed(generate, 4, MODELS["moe"], layout, BATCHES)
    for found in ranks:
        for result, expected in zip(found, stock("moe"), strict=True):
            assert torch.equal(result.tokens, expected.tokens)
            assert_close(result.logits, expected.logits, "moe")


def _layouts() -> list[HelixLayout]:
    heads: dict[str, int] = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16}
    return [HelixLayout(m=m, n=n, **heads) for m, n in [(2, 2), (4, 1), (4, 2), (2, 1)]]


@pytest.mark.parametrize("layout", _layouts(), ids=lambda layout: f"{layout.m}x{layout.n}")
def test_every_position_is_cached_once_and_evenly(layout: HelixLayout) -> None:
    for prefilled in (layout.size, 3 * layout.size):
        capacity = 5 * layout.size
        shares = [
            decode.cached_positions(layout, j, prefilled=prefilled, capacity=capacity)
            for j in range(layout.m)
        ]
        assert torch.equal(torch.cat(shares).sort().values, torch.arange(capacity))
        assert {len(share) for share in shares} == {capacity // layout.m}
        assert all(torch.equal(share, share.sort().values) for share in shares)


def test_a_cache_knows_its_rows() -> None:
    positions = torch.tensor([1, 2, 6, 8])
    cache = decode.SequenceCache(torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1), positions)
    assert [cache.held(end) for end in (0, 1, 2, 7, 9)] == [0, 0, 1, 3, 4]
    cache.write(5, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert not cache.key.any()  # another rank's
    cache.write(6, torch.ones(1, 1, 1, 1), 2 * torch.ones(1, 1, 1, 1))
    assert cache.key.flatten().tolist() == [0, 0, 1, 0]
    assert cache.value.flatten().tolist() == [0, 0, 2, 0]

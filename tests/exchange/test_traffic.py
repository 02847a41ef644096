"""The closed forms of what an exchange sends, against what the ledger counts in a live layer."""

import copy
import dataclasses
from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from megatron_helix.exchange import strategy, traffic
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice
from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.layers.layer_spec import helixify, with_sequence_parallel_norms
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.recording.comm_ledger import CommLedger, install
from megatron_helix.upstream import patches
from tests import block_case
from tests.block_case import Block
from tests.covering import THOROUGH
from tests.cpu_config import cpu_config
from tests.distributed import model_parallel, run_distributed

S, B, HIDDEN, FFN, HEADS, KV_CHANNELS = 24, 12, 32, 48, 4, 8
AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "HELIX_HEAD_GROUP": "head",
    "HELIX_DIM_GROUP": "dim",
}
PLANS = [
    Plan(exchange="activations", split="batch"),
    Plan(exchange="activations", split="sequence"),
    Plan(exchange="weights", split="batch"),
    Plan(exchange="weights", split="sequence"),
    Plan(exchange="weights", split="batch", gather="once"),
    Plan(exchange="weights", split="batch", gather="step"),
    Plan(exchange="scores", split="none"),
]


def _layout(m: int, n: int, groups: int) -> HelixLayout:
    return HelixLayout(
        m=m,
        n=n,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=KV_CHANNELS,
        rotary_dim=KV_CHANNELS,
    )


def _count(m: int, n: int, groups: int) -> dict[tuple[Plan, bool], tuple[Counter, Counter]]:
    """Elements this rank sends in one forward and one backward, by plan and whether gated."""
    patches.relax_head_check()
    layout = _layout(m, n, groups)
    with model_parallel(tp=layout.size):
        return {
            (plan, gated): _sent(plan, layout, gated)
            for plan, gated in product(PLANS, (False, True))
        }


def _sent(plan: Plan, layout: HelixLayout, gated: bool) -> tuple[Counter, Counter]:
    """Of a one-layer decoder block."""
    config = cpu_config(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=layout.num_query_groups,
        kv_channels=KV_CHANNELS,
        tensor_model_parallel_size=layout.size,
        sequence_parallel=True,
        add_bias_linear=False,
        gated_linear_unit=gated,
    )
    choice = Choice(exchange=plan.exchange, split=plan.split, gather=plan.gather)
    if plan.exchange == "scores":
        choice = Choice(exchange="scores")
    spec = helixify(get_gpt_layer_local_spec(), layout, choice)
    spec = with_sequence_parallel_norms(spec, config)
    layer = build_module(spec.layer_specs[0], config=config, layer_number=1)
    x = torch.randn(S // layout.size, B, HIDDEN, requires_grad=True)
    frequencies = RotaryEmbedding(KV_CHANNELS, rotary_percent=1.0, use_cpu_initialization=True)
    ledger = CommLedger()
    uninstall = install(ledger)
    y, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=frequencies(S))
    forward = _elements(ledger)
    y.backward(torch.randn_like(y))
    finish_step([layer])
    backward = _elements(ledger)
    uninstall()
    return forward, backward


@cache
def _counted(m: int, n: int, groups: int) -> list[dict[tuple[Plan, bool], tuple[Counter, Counter]]]:
    """Of every rank, run together: what starts a run costs more than a layer."""
    return run_distributed(_count, m * n, m, n, groups)


def _elements(ledger: CommLedger) -> Counter:
    """What the ledger holds, by the names of the closed forms; anything else would not compare."""
    taken = ledger.take().items()
    return Counter({(AXES[axis], kind): sent.elements for (axis, kind), sent in taken})


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(  # of four rotary pairs three segments are not alike
    ("m", "n", "groups"), [(2, 2, 4), (2, 2, 2), (4, 1, 1), (3, 2, 2), (3, 1, 1)]
)
@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: f"{plan.exchange}_{plan.split}_{plan.gather}"
)
def test_a_layer_sends_what_the_closed_form_says(
    plan: Plan, m: int, n: int, groups: int, gated: bool
) -> None:
    layout = _layout(m, n, groups)
    shape = BlockShape(hidden=HIDDEN, ffn=FFN, gated=gated, num_layers=1)
    size: dict[str, Any] = {"sequence": S, "batch": B}
    forward, backward = traffic.layer(plan, layout, shape, **size)
    for rank, of_rank in enumerate(_counted(m, n, groups)):
        ends = traffic.block_ends(plan, layout, shape, **size, rank=rank)
        expected = (_nonzero(forward + ends), _nonzero(backward + ends))
        sent_forward, sent_backward = of_rank[plan, gated]
        assert (_nonzero(sent_forward), _nonzero(sent_backward)) == expected, f"rank {rank}"


def _nonzero(elements: Counter) -> dict[tuple[str, str], int]:
    """Without collectives over a group of one rank, which send nothing."""
    return {key: count for key, count in elements.items() if count}


def test_the_sum_a_choice_is_made_by_is_the_sum_of_the_parts() -> None:
    layout = _layout(2, 2, 4)
    shape = BlockShape(hidden=HIDDEN, ffn=FFN, gated=False, num_layers=3)
    size: dict[str, Any] = {"sequence": S, "batch": B}
    for plan in PLANS:
        forward, backward = traffic.layer(plan, layout, shape, **size)
        ends = traffic.block_ends(plan, layout, shape, **size)
        if plan.split == "sequence":  # a model's embedding is given word ids in the block's order
            ends.clear()
        whole = forward.total() + backward.total() + 2 * ends.total() / shape.num_layers
        assert traffic.per_layer(plan, layout, shape, **size) == pytest.approx(whole)


def test_what_is_put_in_order_is_what_arrives_in_another() -> None:
    """Tokens before and after an all-to-all; attention's weights when they come, and go."""
    layout = _layout(2, 2, 4)
    shape = BlockShape(hidden=HIDDEN, ffn=FFN, gated=False, num_layers=1)
    size: dict[str, Any] = {"sequence": S, "batch": B}

    def moved(batch: int = B, **plan: str) -> tuple[float, float]:
        made, known = Plan(**{"split": "batch", **plan}), {**size, "batch": batch}
        return traffic.put_in_order(made, layout, shape, **known, microbatches=4)

    tokens = 2 * 2 * S * B * traffic.packed(layout) / layout.size
    assert moved(exchange="activations") == (tokens, tokens)
    once = 2 * traffic.packed(layout) * HIDDEN / layout.n  # read and written
    assert moved(exchange="weights") == (once, 2 * once)
    assert moved(exchange="weights", gather="once") == (once / 4, once)
    # Of gradients that a GEMM adds to a step's sums, a factor: this rank's tokens, if they are few.
    factor = 2 * S * traffic.packed(layout) / layout.size
    assert factor < traffic.COPIES * once < B * factor
    assert moved(1, exchange="weights", gather="step") == (once / 4, factor)
    assert moved(exchange="weights", gather="step") == (once / 4, traffic.COPIES * once)
    assert moved(exchange="scores", split="none") == (0, 0)


def test_auto_takes_what_sends_least() -> None:
    layout = _layout(2, 2, 4)
    shape = BlockShape(hidden=HIDDEN, ffn=FFN, gated=False, num_layers=4)
    for sequence, exchange in ((4, "activations"), (64, "weights")):
        size: dict[str, Any] = {"sequence": sequence, "batch": 4, "sequence_parallel": True}
        assert strategy.resolve(Choice(), layout, shape, **size).exchange == exchange


# A rank's share of the decoder block under stock TP=8/PP=2: half the layers, all their traffic.
def _stock_tp8_pp2(tokens: int, hidden: int, linears_moves: int) -> float:
    return linears_moves * (7 / 8) * tokens * hidden / 2


@pytest.mark.parametrize(
    ("m", "n", "tokens_per_hidden", "train", "bar"),
    [
        (4, 4, 8, False, 0.62),
        (8, 2, 8, False, 0.55),
        (4, 4, 16, False, 0.54),
        (8, 2, 16, False, 0.36),
        (4, 4, 16, True, 0.55),
        (8, 2, 16, True, 0.39),
    ],
)
def test_weights_moves_less_than_tp8_pp2(
    m: int, n: int, tokens_per_hidden: int, train: bool, bar: float
) -> None:
    """Per token and rank of a 4-layer block, FFN = 4 x hidden, in elements."""
    hidden = 1024
    sequence, batch = hidden, tokens_per_hidden
    if batch % m:
        sequence, batch = sequence // 2, batch * 2
    layout = HelixLayout(
        m=m, n=n, num_attention_heads=16, num_query_groups=16, kv_channels=hidden // 16
    )
    shape = BlockShape(hidden=hidden, ffn=4 * hidden, gated=False, num_layers=4)
    plan = Plan(exchange="weights", split="batch")
    size: dict[str, Any] = {"sequence": sequence, "batch": batch}
    forward, backward = traffic.layer(plan, layout, shape, **size)
    ends = traffic.block_ends(plan, layout, shape, **size).total() / shape.num_layers
    sent = forward.total() + ends + (backward.total() + ends if train else 0)
    stock = _stock_tp8_pp2(sequence * batch, hidden, 10 if train else 4)
    assert sent / stock <= bar


def test_weights_moves_a_third_of_tp16() -> None:
    hidden, sequence, batch = 1024, 1024, 8
    layout = HelixLayout(m=4, n=4, num_attention_heads=16, num_query_groups=16, kv_channels=64)
    shape = BlockShape(hidden=hidden, ffn=4 * hidden, gated=False, num_layers=4)
    plan = Plan(exchange="weights", split="batch")
    size: dict[str, Any] = {"sequence": sequence, "batch": batch}
    forward, _ = traffic.layer(plan, layout, shape, **size)
    ends = traffic.block_ends(plan, layout, shape, **size).total() / shape.num_layers
    stock = 4 * (15 / 16) * sequence * batch * hidden
    assert (forward.total() + ends) / stock <= 0.30


# A decoder block of 4 layers with FFN = 4 x hidden, on 16 ranks.
WIDE = Block(layers=4, hidden=128, ffn=512, heads=16, groups=16, kv_channels=8, rope=False)
WEIGHTS = Choice(exchange="weights", split="batch")


Counts = dict[tuple[int, bool], int]


def _sent_bytes(m: int, n: int, pp: int) -> Counts:
    """Bytes this rank sends for the block, or its pipeline stage, by (tokens a channel, training).

    m = 1 is stock.
    """
    size = m * n
    first = dist.get_rank() // size * size
    tp = parallel_state.create_group(
        list(range(first, first + size)),
        use_local_synchronization=True,
        group_desc="TENSOR_MODEL_PARALLEL_GROUP",
    )
    groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"]))
    groups.tp = tp
    block = dataclasses.replace(WIDE, layers=WIDE.layers // pp)
    layers = block_case.build(block, groups, WIDE.layout(m, n) if m > 1 else None, WEIGHTS)
    ledger = CommLedger()
    uninstall = install(ledger)
    counts = {}
    batch = 16
    for per_channel in (8, 16):
        sequence = per_channel * block.hidden // batch
        x = torch.randn(sequence // size, batch, block.hidden, requires_grad=True)
        y = block_case.run(layers, block, x, sequence)
        forward = _all_bytes(ledger)
        y.sum().backward()
        counts[per_channel, False] = forward
        counts[per_channel, True] = forward + _all_bytes(ledger)
    uninstall()
    return counts


def _all_bytes(ledger: CommLedger) -> int:
    return sum(sent.sent_bytes for sent in ledger.take().values())


BARS = [  # m, n, tokens a hidden channel, training step, stock (m, n, pp), largest ratio
    (4, 4, 8, False, (1, 8, 2), 0.62),
    (8, 2, 8, False, (1, 8, 2), 0.55),
    (4, 4, 16, False, (1, 8, 2), 0.54),
    (8, 2, 16, False, (1, 8, 2), 0.36),
    (4, 4, 16, True, (1, 8, 2), 0.55),
    (8, 2, 16, True, (1, 8, 2), 0.39),
    (4, 4, 8, False, (1, 16, 1), 0.30),
]


@THOROUGH
def test_sixteen_ranks_send_less_than_stock() -> None:
    """Counted on 16 live ranks. Stock's sends between its pipeline stages do not count here."""

    def count() -> dict[tuple[int, int, int], Counts]:
        with model_parallel(tp=16):
            return {
                layout: _sent_bytes(*layout)
                for layout in ((4, 4, 1), (8, 2, 1), (1, 8, 2), (1, 16, 1))
            }

    for rank, counted in enumerate(run_distributed(count, 16)):
        for m, n, tokens, train, stock, bar in BARS:
            ratio = counted[m, n, 1][tokens, train] / counted[stock][tokens, train]
            assert ratio <= bar, f"rank {rank}: {m}x{n} at {tokens} x hidden sends {ratio:.3f}"

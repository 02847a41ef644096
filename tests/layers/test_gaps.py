"""Layers whose tokens attend gap by gap, as on a GPU, against Megatron's own on one rank.

In double precision, with a kernel of plain products in the place of TransformerEngine's
(:mod:`tests.gap_case`): output, input gradient and the gradient of every weight.
"""

from functools import cache

import pytest

from megatron_helix.exchange import traffic
from megatron_helix.exchange.traffic import BlockShape
from tests import attention_case
from tests.attention_case import Cut, Model, Result, Weights, stream_part
from tests.covering import fast
from tests.distributed import run_distributed
from tests.exchange import test_traffic
from tests.gap_case import by_gaps
from tests.layers import test_packed_gradients as packed
from tests.layers.test_attention_layer import assert_close, name_of, tolerance, whole_grad
from tests.layers.test_layer_gradients import shard

MODELS = {
    "plain": Model(),
    "grouped queries, biases": Model(heads=8, groups=4, bias=True),
    "qk norm": Model(more={"qk_layernorm": True}),
    "no rope": Model(rope=False),
    "output gate": Model(heads=8, more={"attention_output_gate": True}),
}
SEQUENCE, BATCH = 32, 3
CUTS = [
    Cut(m=m, n=n, exchange=exchange, split="sequence", sequence=SEQUENCE, batch=BATCH, **given)
    for m, n, exchange, given in (
        (2, 1, "weights", {"sequence_parallel": True}),
        (2, 2, "weights", {"sequence_parallel": True}),
        (4, 1, "weights", {"sequence_parallel": True}),
        (4, 1, "activations", {}),
        (2, 2, "activations", {"sequence_parallel": True}),
    )
]

PACKED = [cut for cut in packed.CUTS if cut.m > 1]
SOON = [cut for cut in PACKED if str(cut) in ("2x2-activations", "4x1-weights")]


def parts(cut: Cut, weights: dict[str, Weights]) -> dict[str, Result]:
    """A rank's results. Runs in the ranks of the cut."""
    with by_gaps() as calls:
        found = attention_case.parts(MODELS, cut, weights)
    assert len(calls) >= 2 * len(MODELS)
    assert any(not block.causal for block in calls)
    return found


@cache
def whole_results() -> dict[str, tuple[Weights, Result]]:
    """Of every model, once for all cuts."""
    return run_distributed(attention_case.whole, 1, MODELS, SEQUENCE, BATCH)[0]


@cache
def results_of(cut: Cut) -> list[dict[str, Result]]:
    """Of every rank and model."""
    weights = {name: one[0] for name, one in whole_results().items()}
    return run_distributed(parts, cut.ranks, cut, weights)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", CUTS, ids=name_of)
def test_tokens_that_attend_gap_by_gap_are_whole_attention(cut: Cut, name: str) -> None:
    of_ranks = [of_rank[name] for of_rank in results_of(cut)]
    _, of_whole = whole_results()[name]
    tol = tolerance(cut)
    for rank, part in enumerate(of_ranks):
        assert_close(part.output, stream_part(cut, rank, of_whole.output), "output", tol)
        assert_close(part.input_grad, stream_part(cut, rank, of_whole.input_grad), "input", tol)
    for weight, expected in of_whole.weight_grads.items():
        assert_close(whole_grad(weight, cut, MODELS[name], of_ranks), expected, weight, tol)


def packed_parts(
    cut: packed.Cut, weights: dict[str, packed.Tensors]
) -> dict[str, dict[str, packed.Tensors]]:
    """A rank's results of packed rows. Runs in four ranks."""
    with by_gaps() as calls:
        found = packed.parts(cut, weights)
    assert all(block.packed is not None for block in calls)
    assert any(not block.causal for block in calls)
    return found


@cache
def packed_results_of(cut: packed.Cut) -> list[dict[str, dict[str, packed.Tensors]]]:
    """Of every rank, block and row."""
    weights = {name: one[0] for name, one in packed.whole_results().items()}
    return run_distributed(packed_parts, 4, cut, weights)


@pytest.mark.parametrize("documents", packed.ROWS)
@pytest.mark.parametrize("cut", fast(SOON, PACKED), ids=str)
def test_documents_that_are_attended_to_gap_by_gap_are_whole(
    cut: packed.Cut, documents: str
) -> None:
    for name, block in packed.BLOCKS.items():
        if block.groups % cut.n:
            continue
        whole, layout = packed.whole_results()[name][1][documents], block.layout(cut.m, cut.n)
        for rank, of_rank in enumerate(packed_results_of(cut)):
            for key, tensor in whole.items():
                in_stream = key in ("output", "input")
                expected = (
                    tensor.chunk(4)[rank]
                    if in_stream
                    else shard(tensor, key, layout, rank, block.gated)
                )
                found = of_rank[name][documents][key]
                # A token alone attends to itself, whatever its query and key are: no gradient.
                scale = expected.abs().max().clamp_min(1e-2)
                error = (found - expected).abs().max() / scale
                assert error <= 2000 * 2**-52, f"{name}, rank {rank}, {key}: off by {error:.1e}"


def counted(m: int, n: int) -> dict:
    """Elements that a rank sends, gap by gap. Runs in the ranks of the cut."""
    with by_gaps() as calls:
        found = test_traffic._count(m, n, 4 // n)
    assert calls
    return found


@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1)])
def test_what_is_sent_is_what_the_closed_form_says(m: int, n: int) -> None:
    layout = test_traffic._layout(m, n, 4 // n)
    for rank, of_rank in enumerate(run_distributed(counted, m * n, m, n)):
        for (plan, gated), sent in of_rank.items():
            shape = BlockShape(
                hidden=test_traffic.HIDDEN, ffn=test_traffic.FFN, gated=gated, num_layers=1
            )
            size = {"sequence": test_traffic.S, "batch": test_traffic.B}
            ends = traffic.block_ends(plan, layout, shape, **size, rank=rank)
            for one, expected in zip(sent, traffic.layer(plan, layout, shape, **size), strict=True):
                assert +one == +(expected + ends), plan

"""``HelixSelfAttention`` on four ranks against Megatron's own attention on one.

Output, input gradient and the gradient of every weight, put together again from the tiles.
"""

from functools import cache

import pytest
import torch

from megatron_helix.basics.errors import UserError
from megatron_helix.partition.layout import PADDING
from megatron_helix.partition.tiles import canonical
from tests.attention_case import (
    OFFSET,
    TILED,
    Cut,
    Model,
    Result,
    Weights,
    counts_offset,
    layout_of,
    parts,
    stream_part,
    whole,
)
from tests.covering import THOROUGH
from tests.distributed import run_distributed

MODELS = {
    "plain": Model(),
    "given_mask": Model(mask="given"),
    "padding_mask": Model(mask="padding"),
    "bias": Model(bias=True, mask="given"),
    "no_rope": Model(rope=False),
    "gqa": Model(heads=8, bias=True, mask="given"),
    "gqa_no_rope": Model(heads=8, rope=False, mask="given"),
    "qk_norm": Model(more={"qk_layernorm": True}),
    "qk_rms_norm": Model(more={"qk_layernorm": True, "normalization": "RMSNorm"}),
    "output_gate": Model(heads=8, mask="given", more={"attention_output_gate": True}),
    "softmax_off_by_one": Model(more={"softmax_type": "off-by-one"}),
    "softmax_learnable_offset": Model(more={"softmax_type": "learnable"}),
    "window": Model(more={"window_size": (3, 0)}),
}
FEWER_GROUPS_THAN_RANKS = {
    "2_groups": Model(heads=8, groups=2, bias=True, mask="given"),
    "1_groups": Model(heads=4, groups=1, mask="given"),
}
ALL = MODELS | FEWER_GROUPS_THAN_RANKS
CUTS = [
    Cut(m=m, n=n, exchange=exchange, split=split, sequence_parallel=sequence_parallel)
    for m, n in ((2, 2), (4, 1))
    for exchange, split, sequence_parallel in (
        ("activations", "batch", False),
        ("activations", "batch", True),
        ("activations", "sequence", False),
        ("activations", "sequence", True),
        ("weights", "batch", True),
        ("weights", "sequence", True),
        ("scores", "none", False),
        ("scores", "none", True),
    )
] + [
    Cut(m=1, n=4),
    Cut(m=1, n=4, sequence_parallel=True),
    Cut(m=2, n=2, exchange="weights", split="sequence", sequence_parallel=True, core="prefix"),
    Cut(m=4, n=1, exchange="activations", split="sequence", core="prefix"),
    # Four rotary pairs in three segments, eight channels in three or five: tiles are padded.
    *(
        Cut(m=3, n=n, exchange=exchange, split=split, sequence=12, batch=3, sequence_parallel=sp)
        for n, exchange, split, sp in (
            (1, "activations", "batch", False),
            (2, "activations", "sequence", True),
            (1, "weights", "batch", True),
            (2, "weights", "sequence", True),
            (1, "scores", "none", True),
        )
    ),
    Cut(m=5, n=1, exchange="activations", sequence=10, batch=5, sequence_parallel=True),
    Cut(m=5, n=1, exchange="scores", split="none", sequence=10, batch=1),
]


def name_of(cut: Cut) -> str:
    """A test id."""
    words = [f"{cut.m}x{cut.n}", cut.exchange, cut.split]
    words += ["sp"] * cut.sequence_parallel
    return "-".join(words if cut.core == "spec" else [*words, cut.core])


def waits(cut: Cut) -> bool:
    """For ``--all``: in the fast suite 4 x 1 has sequence parallelism, and 2 x 2 has none."""
    either = cut.m > 1 and cut.ranks == 4 and cut.exchange != "weights" and cut.core == "spec"
    return either and cut.sequence_parallel == (cut.m == 2)


def tolerance(cut: Cut) -> float:
    """Largest error, relative to the largest element, that summing in another order explains.

    Sums of some hundred products, one after the other: some hundred times the unit roundoff. It is
    that of double precision, except that ``scores`` keeps scores and statistics of norms in single.
    """
    return 200 * torch.finfo(torch.float32 if cut.exchange == "scores" else torch.float64).eps


@cache
def whole_results(sequence: int, batch: int) -> dict[str, tuple[Weights, Result]]:
    """Of every model, once for all cuts."""
    return run_distributed(whole, 1, ALL, sequence, batch)[0]


@cache
def results_of(cut: Cut) -> list[dict[str, Result]]:
    """Of every rank and model, run together: forking ranks costs more than what they do."""
    models, of_whole = models_of(cut), whole_results(cut.sequence, cut.batch)
    weights = {name: of_whole[name][0] for name in models}
    return run_distributed(parts, cut.ranks, models, cut, weights)


def models_of(cut: Cut) -> dict[str, Model]:
    """Every model that this layout can cut."""
    return {name: model for name, model in ALL.items() if _fits(cut, model)}


def _fits(cut: Cut, model: Model) -> bool:
    try:
        layout_of(cut, model)
    except UserError:
        return False
    return True


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str, tol: float) -> None:
    """Equal to within roundoff of the largest element."""
    assert actual.shape == expected.shape, name
    scale = expected.abs().max()
    assert scale > 0, f"{name}: nothing to compare"
    error = (actual - expected).abs().max() / scale
    assert error <= tol, f"{name}: off by {error:.1e} of its largest element"


def whole_grad(name: str, cut: Cut, model: Model, of_ranks: list[Result]) -> torch.Tensor:
    """The gradient of a whole weight, from what the ranks have after Megatron's own sums."""
    layout = layout_of(cut, model)
    grads = [part.weight_grads[name] for part in of_ranks]
    if name in TILED:
        axis, order = TILED[name]
        tiles = torch.cat(grads, dim=axis)
        padding = (order(layout) == PADDING).nonzero().squeeze(1)
        assert not tiles.index_select(axis, padding).count_nonzero(), name
        return canonical(tiles, order(layout), axis)
    if name in of_ranks[0].summed_over_ranks:
        return torch.stack(grads).sum(0)
    if name == OFFSET:
        return torch.cat([grads[layout.dim_group(i * layout.m)[0]] for i in range(layout.n)])
    return grads[0]


@pytest.mark.parametrize(
    ("cut", "model_name"),
    [
        pytest.param(cut, name, id=f"{name_of(cut)}-{name}", marks=THOROUGH if waits(cut) else ())
        for cut in CUTS
        for name in models_of(cut)
    ],
)
def test_cut_attention_is_whole_attention(cut: Cut, model_name: str) -> None:
    model = models_of(cut)[model_name]
    of_ranks = [of_rank[model_name] for of_rank in results_of(cut)]
    _, of_whole = whole_results(cut.sequence, cut.batch)[model_name]
    tol = tolerance(cut)
    for rank, part in enumerate(of_ranks):
        assert_close(part.output, stream_part(cut, rank, of_whole.output), "output", tol)
        assert_close(part.input_grad, stream_part(cut, rank, of_whole.input_grad), "input", tol)
    for name, expected in of_whole.weight_grads.items():
        assert_close(whole_grad(name, cut, model, of_ranks), expected, name, tol)


@pytest.mark.parametrize(
    ("cut", "model_name"),
    [
        pytest.param(cut, name, id=f"{name_of(cut)}-{name}", marks=THOROUGH if waits(cut) else ())
        for cut in CUTS
        if cut.m < 5
        for name in ("bias", "softmax_learnable_offset")
        if name in models_of(cut)
    ],
)
def test_copies_of_a_weight_get_equal_gradients(cut: Cut, model_name: str) -> None:
    """Else the copies of a weight on several ranks would drift apart in training."""
    layout = layout_of(cut, models_of(cut)[model_name])
    of_ranks = [of_rank[model_name] for of_rank in results_of(cut)]
    copied = of_ranks[0].weight_grads.keys() - TILED.keys() - of_ranks[0].summed_over_ranks
    for name in copied:
        for rank, part in enumerate(of_ranks):
            first = layout.dim_group(rank)[0] if name == OFFSET else 0
            assert torch.equal(part.weight_grads[name], of_ranks[first].weight_grads[name]), name


@pytest.mark.parametrize("cut", [Cut(m=2, n=2), Cut(m=4, n=1)], ids=name_of)
def test_every_softmax_offset_counts_once_in_the_gradient_norm(cut: Cut) -> None:
    counted = run_distributed(counts_offset, 4, MODELS["softmax_learnable_offset"], cut)
    assert sum(counted) == cut.n  # a copy of each head group's

"""Tensor-parallel degrees that stock Megatron refuses, against one that it accepts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix import plugin, pretrain_gpt
from megatron_helix.options import arguments
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.upstream import patches
from tests.covering import THOROUGH
from tests.distributed import Curve, measured, pretrain, pretrain_launched, tiny_gpt

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py

TP = "--tensor-model-parallel-size"
CHANNELS = 8  # of a head; twice that for one query group, cut by all of 16 ranks


def model(heads: int, groups: int, channels: int = CHANNELS) -> tuple[str, ...]:
    """Flags of a model with these head counts."""
    grouped = ("--group-query-attention", "--num-query-groups", str(groups))
    return (
        *("--num-attention-heads", str(heads), "--kv-channels", str(channels)),
        *(grouped if groups != heads else ()),
    )


# heads, query groups, head dimension, ranks of stock, ranks of helix, the (m, n) that auto finds
DEGREES = [
    (16, 2, 16, 2, 16, (8, 2)),
    (28, 4, 8, 4, 8, (2, 4)),
    (40, 10, 8, 2, 4, (2, 2)),
    (40, 10, 16, 2, 16, (8, 2)),
    (52, 52, 8, 4, 8, (2, 4)),
    (8, 1, 32, 1, 16, (16, 1)),
    (6, 3, 8, 1, 4, (4, 1)),
]

SOON = (4,)  # ranks

# Degrees that divide neither heads nor head dimension: ranks, the (m, n) that auto finds, exchange.
# Of a head's eight rotary pairs three, five and seven segments are not alike.
UNEVEN = [
    (3, (3, 1), ("--helix-exchange", "activations", "--helix-split", "sequence")),
    (5, (5, 1), ("--helix-exchange", "weights")),
    (6, (3, 2), ("--helix-exchange", "weights")),
    (6, (3, 2), ("--helix-m", "3", "--helix-exchange", "weights", "--helix-gather", "step")),
    (6, (3, 2), ("--helix-exchange", "activations", "--micro-batch-size", "3")),
    (7, (7, 1), ("--helix-exchange", "scores")),
    (7, (7, 1), ("--helix-exchange", "auto")),
]
SHARED = (  # among all of these ranks, and those of stock
    *("--seq-length", "210", "--max-position-embeddings", "210", "--ffn-hidden-size", "420"),
    *("--vocab-size", "420", "--make-vocab-size-divisible-by", "1", "--global-batch-size", "6"),
    *("--micro-batch-size", "2"),
    *("--attention-output-gate", "--qk-layernorm", "--rotary-percent", "1.0"),
)

Train = Callable[..., Curve]


@pytest.fixture
def train(corpus_prefix: Path) -> Train:
    """Train the tiny GPT with these flags, on as many ranks as the tensor-parallel size."""

    def run(size: int, *flags: str) -> Curve:
        parallel = (TP, str(size), *(("--sequence-parallel",) if size > 1 else ()))
        return pretrain(tiny_gpt(corpus_prefix, *parallel, *flags), size)

    return run


@pytest.mark.parametrize(
    ("heads", "groups", "channels", "stock", "ranks", "_cut"),
    [pytest.param(*one, marks=() if one[4] in SOON else THOROUGH) for one in DEGREES],
)
def test_a_degree_that_stock_refuses_gives_stocks_numbers(
    train: Train, heads: int, groups: int, channels: int, stock: int, ranks: int, _cut: object
) -> None:
    flags = model(heads, groups, channels)
    expected = train(stock, *flags)
    actual = train(ranks, *flags, "--helix-n", "auto", "--helix-split", "sequence")
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.fixture(scope="module")
def of_stock(corpus_prefix: Path) -> Curve:
    """The model of :data:`UNEVEN` on two ranks, which stock takes."""
    parallel = (TP, "2", "--sequence-parallel")
    return pretrain(tiny_gpt(corpus_prefix, *parallel, *model(4, 2, 16), *SHARED), 2)


@pytest.mark.parametrize(
    ("ranks", "cut", "exchange"),
    [pytest.param(*one, marks=() if one[0] == 3 else THOROUGH) for one in UNEVEN],
)
def test_segments_that_are_not_alike_give_stocks_numbers(
    corpus_prefix: Path,
    of_stock: Curve,
    ranks: int,
    cut: tuple[int, int],
    exchange: tuple[str, ...],
) -> None:
    parallel = (TP, str(ranks), "--sequence-parallel", "--helix-n", "auto")
    flags = tiny_gpt(corpus_prefix, *parallel, *model(4, 2, 16), *SHARED, *exchange)
    m, n = (str(size) for size in cut)
    assert arguments.complete(flags, ranks)[-6:-2] == ["--helix-m", m, "--helix-n", n]
    actual = pretrain(flags, ranks)
    assert actual.losses == pytest.approx(of_stock.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(of_stock.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize(("heads", "groups", "channels", "_stock", "ranks", "cut"), DEGREES)
def test_auto_takes_as_many_head_groups_as_the_heads_allow(
    corpus_prefix: Path,
    heads: int,
    groups: int,
    channels: int,
    _stock: object,
    ranks: int,
    cut: tuple[int, int],
) -> None:
    flags = tiny_gpt(corpus_prefix, *model(heads, groups, channels), TP, str(ranks))
    splits = ("--helix-n", "auto", "--helix-split", "sequence")
    m, n = (str(size) for size in cut)
    argv = arguments.complete([*flags, *splits], ranks)
    assert argv[argv.index("--helix-m") :][:4] == ["--helix-m", m, "--helix-n", n]


@pytest.mark.parametrize(("given", "m", "n"), [("--helix-m", "4", "2"), ("--helix-n", "2", "4")])
def test_one_of_m_and_n_follows_from_the_other(
    corpus_prefix: Path, given: str, m: str, n: str
) -> None:
    value = {"--helix-m": m, "--helix-n": n}[given]
    flags = tiny_gpt(corpus_prefix, *model(4, 4), TP, "8", given, value)
    argv = arguments.complete([*flags, "--helix-split", "sequence"], 8)
    assert argv[-6:-2] == ["--helix-m", m, "--helix-n", n]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--seq-length", "31"),
            r"--seq-length: must be .* \(4\), got 31; use 28 or 32",
        ),
        (
            ("--hidden-size", "66", "--mtp-num-layers", "1"),
            r"--hidden-size: .* beside --mtp-num-layers, \(4\), got 66; use 64 or 68",
        ),
        (("--padded-vocab-size", "258"), r"--padded-vocab-size: .* got 258; use 256 or 260"),
        (
            ("--num-experts", "5", "--expert-model-parallel-size", "2"),
            r"--num-experts: must be a multiple of --expert-.* \(2\), got 5; use 4 or 6",
        ),
    ],
)
def test_what_nothing_pads_says_which_number_would_do(
    corpus_prefix: Path, flags: tuple[str, ...], message: str
) -> None:
    cut = (TP, "4", "--sequence-parallel", "--helix-n", "auto", "--helix-split", "batch")
    with pytest.raises(ValueError, match=message):
        arguments.complete(tiny_gpt(corpus_prefix, *model(4, 2), *cut, *flags), 4)


def test_where_the_heads_divide_auto_is_stock_and_says_so(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    plain = tiny_gpt(corpus_prefix, *model(4, 4), TP, "4", "--sequence-parallel", train_iters=2)
    stock = measured(plain, 4, tmp_path / "stock")
    auto = pretrain_launched([*plain, "--helix-n", "auto"], 4, tmp_path / "auto")
    assert auto.losses == stock.losses  # to the last bit
    assert auto.grad_norms == stock.grad_norms
    assert auto.sent_bytes == stock.sent_bytes
    said = "helix 1x4: the heads divide; this is plain tensor parallelism"
    assert said in (tmp_path / "auto" / "logs" / "rank00.log").read_text()


def test_what_padding_adds_is_said() -> None:
    model = {"n": 1, "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128}
    assert plugin._said(HelixLayout(m=4, rotary_dim=128, **model)) == []
    assert plugin._said(HelixLayout(m=3, rotary_dim=128, **model)) == [
        "helix 3x1: heads of 128 channels are stored as 3 segments of 44; padding adds 3.1% to the"
        " attention weights"
    ]
    assert HelixLayout(m=3, **model).waste == pytest.approx(1 / 128)


def test_the_head_check_is_relaxed_and_nothing_else_of_a_config() -> None:
    sizes = {"num_layers": 1, "hidden_size": 24, "tensor_model_parallel_size": 4}
    stock = TransformerConfig.__post_init__
    with pytest.raises(ValueError, match=r"num_attention_heads \(6\) must be a multiple"):
        TransformerConfig(num_attention_heads=6, **sizes)
    try:
        patches.relax_head_check()
        patches.relax_head_check()  # a second time changes nothing
        config = TransformerConfig(num_attention_heads=6, num_query_groups=3, **sizes)
        assert (config.num_attention_heads, config.num_query_groups) == (6, 3)
        assert type(config.num_attention_heads) is type(config.num_query_groups) is int
        assert config.kv_channels == 4
        with pytest.raises(ValueError, match=r"Only one of self\.fp16"):
            TransformerConfig(num_attention_heads=6, fp16=True, bf16=True, **sizes)
    finally:
        TransformerConfig.__post_init__ = stock


def test_a_megatron_that_checks_something_else_is_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def another(config: TransformerConfig) -> None:
        """A check that lets 3 heads on 2 ranks pass."""

    monkeypatch.setattr(TransformerConfig, "__post_init__", another)
    with pytest.raises(ImportError, match=r"expected to refuse 3 heads on 2 tensor-parallel ranks"):
        patches.relax_head_check()
    assert TransformerConfig.__post_init__ is another


@pytest.mark.parametrize("flags", [(), ("--helix-n", "auto")])
def test_the_head_check_is_relaxed_only_where_helix_is_on(
    corpus_prefix: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    stock = TransformerConfig.__post_init__
    monkeypatch.setattr(TransformerConfig, "__post_init__", stock)  # put back in the end
    argv = tiny_gpt(corpus_prefix, *model(6, 3), TP, "4", *flags)
    pretrain_gpt.adapt_megatron(arguments.complete(argv, 4))
    assert (TransformerConfig.__post_init__ is stock) == (not flags)

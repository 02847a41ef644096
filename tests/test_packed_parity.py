"""Training on packed rows, with and without helix, on CPU ranks: the same numbers.

Both sides keep documents apart with :mod:`megatron_helix.kernels.document_attention`, which its own
tests hold to scores of whole rows.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from megatron_helix import conversations
from tests.covering import THOROUGH, covering
from tests.distributed import Curve, measured, pretrain, tiny_gpt
from tests.packed_case import LENGTHS, dataset
from tests.test_parity import FULL_RECOMPUTE, PP2, assert_same_training, recompute

STEPS = 5
CONVERSATIONS = ("--sft", "--sequence-parallel")
PACKED = ("--dataloader-inter-document-masking", "--sequence-parallel", "--eod-mask-loss")
# Of one query group the head axis takes one head group: 4 x 1 has multi-query attention.
MODELS = {
    "dense": (),
    "gated": (
        *("--disable-bias-linear", "--swiglu", "--normalization", "RMSNorm", "--qk-layernorm"),
        *("--group-query-attention", "--num-query-groups", "4", "--num-attention-heads", "8"),
        *("--attention-output-gate", "--untie-embeddings-and-output-weights"),
    ),
    "moe": (
        *("--disable-bias-linear", "--num-experts", "4", "--moe-router-topk", "4"),
        *("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "none"),
        *("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"),
    ),
    "window": ("--window-size", "(5,0)", "--position-embedding-type", "none"),
    "positions": ("--position-embedding-type", "learned_absolute"),
    "mtp": ("--mtp-num-layers", "1"),
    "sinks": ("--softmax-type", "off-by-one", "--rotary-percent", "0.5"),
}
# One document longer than a row, so that no end falls into most of them. Of padding, conversations.
OF_DATASET = {**LENGTHS, "one document": [640]}
PER_SAMPLE = (
    *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1"),
    *("--moe-router-topk", "2"),
)
ROW_BY_ROW = ("--micro-batch-size", "1", "--global-batch-size", "2")

Train = Callable[..., Curve]


def padded(prefix: Path) -> Path:
    """A dataset of rows that end in padding, behind two conversations or one."""
    talks = [
        [
            {"role": "system", "content": ""},
            {"role": "assistant", "content": f"{number}"[: 1 + number % 5]},
        ]
        for number in range(10000, 10080)
    ]
    assert conversations.write(talks, prefix, row_tokens=32).tokens < 32 * 40
    return conversations.dataset_files(prefix)[0]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train the tiny GPT on documents of some lengths; stock once for each of its flags."""
    folder = tmp_path_factory.mktemp("documents")
    data: dict[str, Path] = {}
    stock: dict[tuple[str, ...], Curve] = {}

    def run(lengths: str, *flags: str) -> Curve:
        if lengths not in data:
            prefix = folder / lengths.replace(" ", "_")
            pads = lengths == "padding"
            data[lengths] = padded(prefix) if pads else dataset(prefix, OF_DATASET[lengths])
        packing = CONVERSATIONS if lengths == "padding" else PACKED
        argv = tiny_gpt(data[lengths], *packing, *flags, train_iters=STEPS)
        if "--helix-m" in flags:
            return pretrain(argv, 4)
        if tuple(argv) not in stock:
            stock[tuple(argv)] = pretrain(argv, 4)
        return stock[tuple(argv)]

    return run


STOCK = ("--tensor-model-parallel-size", "4")


def helix(m: int, n: int, exchange: str) -> tuple[str, ...]:
    """The flags of a partition."""
    return ("--helix-m", str(m), "--helix-n", str(n), "--helix-exchange", exchange)


@pytest.mark.parametrize(
    ("exchange", "cut", "model", "lengths"),
    covering(
        product(
            ["activations", "weights"],
            [(2, 2), (4, 1)],
            ["dense", "gated", "moe"],
            ["very unequal", "equal", "one token", "one document", "padding"],
        ),
        of=(0, 1),  # every model and length: tests/layers/test_packed_gradients.py
    ),
)
def test_packed_rows_train_as_stock(
    train: Train, exchange: str, cut: tuple[int, int], model: str, lengths: str
) -> None:
    flags = MODELS[model]
    found = train(lengths, *flags, *helix(*cut, exchange))
    assert_same_training(found, train(lengths, *flags, *STOCK), STEPS)


@THOROUGH
@pytest.mark.parametrize("lengths", [*OF_DATASET])
@pytest.mark.parametrize("model", ["dense", "gated", "moe"])
def test_with_one_segment_packed_rows_are_stocks(train: Train, model: str, lengths: str) -> None:
    flags = MODELS[model]
    cut = ("--helix-m", "1", "--helix-n", "4")
    found = train(lengths, *flags, *cut)
    assert_same_training(found, train(lengths, *flags, *STOCK), STEPS)


TP4, TP2 = ((2, 2), STOCK), ((2, 1), ("--tensor-model-parallel-size", "2"))
# What else a run can ask for, and the partition beside stock's: m x n, or by half the ranks.
RUNS = {
    "recomputed": (FULL_RECOMPUTE, TP4),
    "core attention recomputed": (recompute("core_attn"), TP4),
    "row by row": (ROW_BY_ROW, TP4),
    # Micro-batches of a pipeline are under way together, each with documents of its own.
    "pipeline": ((*PP2, "--micro-batch-size", "1", *recompute("core_attn")), TP2),
    "data parallel": (("--use-distributed-optimizer",), TP2),
    "one query group": (
        ("--group-query-attention", "--num-query-groups", "1"),
        ((4, 1), STOCK),
    ),
    # Of samples that are flattened into a row, in stock's order.
    "a loss of each sample's experts": (
        (*MODELS["moe"], *PER_SAMPLE, "--micro-batch-size", "8", "--global-batch-size", "16"),
        TP4,
    ),
    **{name: (MODELS[name], TP4) for name in ("window", "positions", "mtp", "sinks")},
}


@THOROUGH
@pytest.mark.parametrize(("run", "exchange"), list(product(RUNS, ["activations", "weights"])))
def test_packed_rows_with_what_else_a_run_asks_for(train: Train, run: str, exchange: str) -> None:
    flags, (cut, stock) = RUNS[run]
    found = train("very unequal", *flags, *helix(*cut, exchange))
    assert_same_training(found, train("very unequal", *flags, *stock), STEPS)


@THOROUGH
@pytest.mark.parametrize("gather", ["once", "step"])
def test_packed_rows_with_weights_gathered_once_a_step(train: Train, gather: str) -> None:
    found = train("very unequal", *helix(2, 2, "weights"), "--helix-gather", gather)
    assert_same_training(found, train("very unequal", *STOCK), STEPS)


@THOROUGH
@pytest.mark.parametrize("cut", [(2, 2), (4, 1)])
def test_packed_rows_without_sequence_parallelism(tmp_path: Path, cut: tuple[int, int]) -> None:
    data = dataset(tmp_path / "documents", LENGTHS["very unequal"])
    curves = [
        pretrain(tiny_gpt(data, PACKED[0], *flags, train_iters=STEPS), 4)
        for flags in (helix(*cut, "activations"), STOCK)
    ]
    assert_same_training(*curves, STEPS)


@THOROUGH
@pytest.mark.parametrize("exchange", ["activations", "weights"])
def test_packed_rows_send_what_rows_of_one_document_send(tmp_path: Path, exchange: str) -> None:
    """By the helix groups, which the closed forms of `exchange/traffic.py` are held to."""
    data = dataset(tmp_path / "documents", LENGTHS["very unequal"])
    flags = (*helix(2, 2, exchange), *ROW_BY_ROW, "--sequence-parallel")
    sent = []
    for name, packing in (("packed", PACKED[:1]), ("through", ("--helix-split", "sequence"))):
        argv = tiny_gpt(data, *flags, *packing, train_iters=1)
        counted = measured(argv, 4, tmp_path / name).sent_bytes
        sent.append({key: of for key, of in counted.items() if key.startswith("HELIX_")})
    assert sent[0] == sent[1]
    assert any(sent[0].values())

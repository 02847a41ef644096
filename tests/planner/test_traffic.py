"""Predicted bytes against what the ledger counts in Megatron's own loop: every rank, every byte."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from megatron_helix import corpus
from megatron_helix.experiment import config
from megatron_helix.planner.book import share
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.sizes import VOCAB_MULTIPLE
from megatron_helix.planner.traffic import AXES, step_bytes
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import Precision
from megatron_helix.run_config.words import switch
from tests.covering import THOROUGH, covering, fast
from tests.distributed import measured
from tests.packed_case import dataset

QUICKSTART = config.load(Path("configs/experiments/quickstart.yaml"))

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 256,
}
EXPERTS = {"num_experts": 4, "moe_router_topk": 4}  # every token to every expert: nothing is routed
UNTIED = {"untie_embeddings_and_output_weights": True}
MODERN = {
    **{"swiglu": True, "normalization": "RMSNorm", "qk_layernorm": True, "add_qkv_bias": True},
    **{"untie_embeddings_and_output_weights": True, "rotary_percent": 0.5},
}
MODELS = {
    "dense": ModelConfig(name="dense", **TINY),
    "swiglu": ModelConfig(name="swiglu", swiglu=True, **TINY),
    "gqa": ModelConfig(name="gqa", num_query_groups=2, **TINY),
    "learned": ModelConfig(name="learned", position_embedding_type="learned_absolute", **TINY),
    "biased": ModelConfig(name="biased", add_bias_linear=True, **TINY),
    "deep": ModelConfig(name="deep", **{**TINY, "num_layers": 6}),
    "modern": ModelConfig(name="modern", **MODERN, num_query_groups=2, **TINY),
    "uneven": ModelConfig(name="uneven", swiglu=True, **{**TINY, "ffn_hidden_size": 250}),
    "uneven moe": ModelConfig(name="uneven_moe", **EXPERTS, **{**TINY, "ffn_hidden_size": 250}),
    # Ten rotary pairs, of which four segments are not alike.
    "unlike": ModelConfig(
        name="unlike", **{**TINY, "kv_channels": 20}, add_qkv_bias=True, num_query_groups=2
    ),
    "moe": ModelConfig(name="moe", **EXPERTS, **TINY),
    "biased_moe": ModelConfig(
        name="biased_moe", add_bias_linear=True, softmax_type="learnable", **EXPERTS, **TINY
    ),
    "routed": ModelConfig(name="routed", num_experts=4, **TINY),
    "untied": ModelConfig(name="untied", **UNTIED, **TINY),
    "untied moe": ModelConfig(name="untied_moe", **UNTIED, **EXPERTS, **TINY),
}
LENGTH = 32
CUT = {"m": 2, "n": 2, "micro_batch": 4}
WEIGHTS = {**CUT, "exchange": "weights", "split": "batch"}
# With micro-batches of 8 embedding and head keep the block's token order: 256 > 256 / n tokens.
WIDE = {**WEIGHTS, "micro_batch": 8}
CASES = [
    ("dense", 4, {"tp": 4, "micro_batch": 4}),
    ("gqa", 4, {"tp": 4, "micro_batch": 4}),  # of two groups: QKV is gathered
    ("learned", 4, {"tp": 2, "pp": 2, "micro_batch": 4}),
    ("dense", 4, {"tp": 2, "micro_batch": 4}),
    ("dense", 8, {"tp": 2, "pp": 2, "micro_batch": 4, "distributed_optimizer": True}),
    ("dense", 4, {**CUT, "exchange": "activations", "split": "batch"}),
    ("dense", 4, {**CUT, "m": 1, "n": 4, "exchange": "activations", "split": "batch"}),
    ("gqa", 4, {**CUT, "exchange": "activations", "split": "sequence"}),
    ("dense", 4, {**CUT, "exchange": "scores"}),
    ("dense", 4, {**WEIGHTS}),
    ("gqa", 4, {**WEIGHTS, "split": "sequence", "gather": "step"}),
    ("swiglu", 4, {**WIDE}),
    ("dense", 4, {**WIDE, "m": 4, "n": 1, "gather": "step"}),
    ("swiglu", 4, {**WIDE, "m": 4, "n": 1, "gather": "once"}),
    ("dense", 4, {**WEIGHTS, "m": 1, "n": 4}),
    ("dense", 8, {**WIDE, "pp": 2}),
    ("gqa", 8, {**WIDE, "pp": 2, "split": "sequence", "gather": "step"}),
    ("dense", 8, {**WIDE, "distributed_optimizer": True}),
    ("dense", 4, {**WEIGHTS, "m": 4, "n": 1, "split": "sequence", "micro_batch": 2}),
    # Learned positions are added in stock's order: the stream is dealt, and each rank keeps another
    # part of it.
    ("learned", 4, {**WEIGHTS, "m": 4, "n": 1, "split": "sequence", "micro_batch": 2}),
    ("learned", 4, {**WIDE}),
    ("learned", 4, {**WIDE, "split": "sequence", "gather": "once"}),
    ("untied", 4, {**WIDE, "split": "sequence", "gather": "step"}),
    ("untied", 8, {**WIDE, "pp": 2, "gather": "once"}),
    ("swiglu", 4, {**CUT, "m": 4, "n": 1, "exchange": "activations", "split": "batch"}),
    ("unlike", 4, {**WIDE, "m": 4, "n": 1}),
    ("modern", 8, {**WIDE, "pp": 2}),
    ("uneven", 8, {**WIDE, "distributed_optimizer": True}),
    ("uneven moe", 4, {**CUT, "etp": 4, "exchange": "activations"}),
    ("modern", 8, {**CUT, "exchange": "activations", "distributed_optimizer": True}),
    ("moe", 4, {**CUT, "ep": 4, "exchange": "activations", "split": "sequence"}),
    ("moe", 4, {**CUT, "ep": 4, "exchange": "scores"}),
    ("moe", 4, {**WEIGHTS, "split": "sequence", "ep": 4}),
    ("moe", 8, {"tp": 2, "pp": 2, "ep": 4, "micro_batch": 4}),
    ("moe", 8, {"tp": 4, "ep": 2, "etp": 2, "micro_batch": 4, "distributed_optimizer": True}),
    ("moe", 4, {"tp": 2, "etp": 2, "micro_batch": 4}),
    # Experts whole on every rank, beside attention that is cut: replicas of their own.
    ("moe", 4, {"tp": 2, "micro_batch": 4}),
    ("moe", 4, {**WEIGHTS, "distributed_optimizer": True}),
    ("moe", 4, {**WIDE, "ep": 4}),
    ("moe", 8, {**WIDE, "ep": 4, "gather": "step", "distributed_optimizer": True}),
]
FSDP2 = {"tp": 1, "fsdp": "torch_fsdp2", "micro_batch": 2}
MEGATRON_FSDP = {**FSDP2, "fsdp": "megatron_fsdp"}
SHARDED_SOON = [
    ("untied", 4, {**FSDP2, "tp": 2}, "fp32"),
    ("untied", 3, MEGATRON_FSDP, "fp32"),  # rows of no tensor are a multiple of the ranks
    ("untied moe", 4, {**MEGATRON_FSDP, "ep": 2}, "bf16"),
]
SHARDED = [
    *SHARDED_SOON,
    ("untied", 3, FSDP2, "fp32"),
    ("untied", 4, FSDP2, "bf16"),
    ("untied", 4, MEGATRON_FSDP, "bf16"),
    ("untied", 4, {**MEGATRON_FSDP, "tp": 2}, "fp32"),
    ("untied moe", 2, MEGATRON_FSDP, "fp32"),
    ("biased", 3, MEGATRON_FSDP, "bf16"),  # embedding, head and the last norm share a bucket
    ("learned", 2, MEGATRON_FSDP, "fp32"),
    ("modern", 4, {**MEGATRON_FSDP, "tp": 2}, "fp32"),
    ("untied moe", 2, FSDP2, "fp32"),
    ("untied moe", 4, {**FSDP2, "tp": 2, "etp": 2}, "fp32"),
    ("modern", 4, {**FSDP2, "tp": 2}, "fp32"),
    ("untied", 4, {"tp": 1, "micro_batch": 2, "distributed_optimizer": True}, "bf16"),
    (
        "untied",
        4,
        {"tp": 2, "micro_batch": 2, "distributed_optimizer": True, "overlap_dp": True},
        "fp32",
    ),
    ("untied", 4, {"tp": 1, "pp": 2, "micro_batch": 2}, "fp32"),
    ("untied", 4, {**CUT, "exchange": "weights"}, "fp32"),
]
BIASED = [
    ("unlike", 4, {**CUT, "m": 4, "n": 1, "exchange": "activations"}, "fp32"),
    ("unlike", 8, {**WEIGHTS, "m": 4, "n": 1, "distributed_optimizer": True}, "bf16"),
    ("biased", 8, {"tp": 4, "micro_batch": 4, "distributed_optimizer": True}, "fp32"),
    ("biased", 4, {**WIDE}, "fp32"),
    ("biased", 4, {**WEIGHTS, "gather": "step"}, "bf16"),
    ("biased_moe", 8, {"tp": 4, "ep": 4, "micro_batch": 4}, "fp32"),
    ("biased_moe", 4, {**WEIGHTS, "ep": 4, "split": "sequence"}, "fp32"),
    ("biased_moe", 4, {**CUT, "ep": 4, "exchange": "activations"}, "fp16"),
]
# Some layers of a stage keep what they gather, embedding and head do not.
SOME = {**WEIGHTS, "gather": "once", "gather_layers": 1}
SOME_SOON = (
    "deep",
    8,
    {**SOME, "pp": 2, "split": "sequence", "gather": "step", "micro_batch": 8},
    "fp32",
)
SOME_KEPT = [
    SOME_SOON,
    ("deep", 4, {**SOME, "m": 4, "n": 1, "gather_layers": 4}, "bf16"),
    ("gqa", 4, {**SOME, "gather_layers": 5}, "fp32"),  # all
    ("biased", 4, {**SOME, "gather": "step"}, "bf16"),
]
# Gradients are as wide as weights in fp16, and in fp32 in bf16; fp16 asks for overflows.
HALF = [
    ("dense", 4, {**WIDE, "m": 4, "n": 1, "gather": "step"}),
    ("dense", 8, {"tp": 2, "pp": 2, "micro_batch": 4, "distributed_optimizer": True}),
    ("dense", 8, {**WEIGHTS, "pp": 2}),
    ("moe", 8, {"tp": 2, "pp": 2, "ep": 4, "micro_batch": 4}),
    ("moe", 8, {"tp": 4, "ep": 2, "etp": 2, "micro_batch": 4, "distributed_optimizer": True}),
]
PRECISE = [
    *((*case, "fp32") for case in CASES),
    *((*case, precision) for case in HALF for precision in ("fp16", "bf16")),
]
Sent = dict[tuple[str, str], float]


def _run(
    model: ModelConfig,
    layout: LayoutConfig,
    batch: BatchConfig,
    world_size: int,
    prefix: Path,
    folder: Path,
    precision: Precision = "fp32",
    more: Sequence[str] = (),
) -> list[Sent]:
    """What each rank sent in the second step, from its ledger; the first one also sets up."""
    length = str(batch.sequence_length)
    flags = [
        *("--helix-device", "cpu", *model.flags(), *layout.flags(model), *corpus.TOKENIZER_FLAGS),
        *("--make-vocab-size-divisible-by", str(VOCAB_MULTIPLE)),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--global-batch-size", str(batch.sequences), "--train-iters", "2", "--lr", "1e-3"),
        *("--data-path", str(prefix), "--split", "100,0,0", "--num-workers", "0"),
        *("--eval-iters", "0", "--eval-interval", "1000"),
        "--no-create-attention-mask-in-dataloader",
        *(["--dataloader-inter-document-masking"] if batch.documents else []),
        *{"fp32": [], "bf16": ["--bf16"], "fp16": ["--fp16", "--initial-loss-scale", "1024"]}[
            precision
        ],
        *more,
    ]
    measured(flags, world_size, folder)
    return _counted(folder, world_size, "sent_bytes")


def _counted(folder: Path, world_size: int, what: str) -> list[Sent]:
    """A count of each rank's ledger in the last step."""
    lines = [
        json.loads((folder / "metrics" / f"rank{rank:02d}.jsonl").read_text().splitlines()[-1])
        for rank in range(world_size)
    ]
    return [{(e["axis"], e["kind"]): e[what] for e in line["traffic"] if e[what]} for line in lines]


def _predicted(
    model: ModelConfig,
    layout: LayoutConfig,
    batch: BatchConfig,
    world_size: int,
    precision: Precision = "fp32",
    gradient_flags: GradientFlags = GradientFlags(),
) -> list[Sent]:
    here = Deployment(
        *(model, layout, batch, world_size, "train", precision), gradient_flags=gradient_flags
    )
    return [step_bytes(here, rank) for rank in range(world_size)]


def batch_of(layout: LayoutConfig, world_size: int) -> BatchConfig:
    """Two micro-batches on every rank, or one where two would be many."""
    replicas = world_size // (layout.tensor_parallel_size * layout.pp)
    sequences = min(2 * layout.micro_batch * replicas, 16)
    return BatchConfig(sequences=sequences, sequence_length=LENGTH)


PACKED = BatchConfig(sequences=4, sequence_length=LENGTH, documents=(1, 2, 21, 3, 1, 4))


@pytest.mark.parametrize(
    "layout",
    fast(
        [{"m": 2, "n": 1, "pp": 2, "exchange": "weights"}],
        [
            {"m": 2, "n": 1, "pp": 2, "exchange": "weights"},
            {"m": 4, "n": 1, "exchange": "activations"},
            {"m": 2, "n": 2, "exchange": "weights", "micro_batch": 4},
            {"tp": 4, "micro_batch": 4},
        ],
    ),
    ids=str,
)
def test_a_step_of_packed_rows_sends_what_is_predicted(tmp_path: Path, layout: dict) -> None:
    assert PACKED.documents
    prefix = dataset(tmp_path / "documents", list(PACKED.documents))
    cut = LayoutConfig(**{"name": "case", "micro_batch": 1, **layout})
    sent = _run(MODELS["dense"], cut, PACKED, 4, prefix, tmp_path)
    assert sent == _predicted(MODELS["dense"], cut, PACKED, 4)


@pytest.mark.parametrize(
    ("model", "world_size", "layout", "precision"),
    [
        *covering(PRECISE, of=(0, 1, 3)),
        *(pytest.param(*case, marks=THOROUGH) for case in BIASED),
        *(pytest.param(*case, marks=() if case in SHARDED_SOON else THOROUGH) for case in SHARDED),
        *(pytest.param(*case, marks=() if case == SOME_SOON else THOROUGH) for case in SOME_KEPT),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_step_sends_what_is_predicted(
    corpus_prefix: Path,
    tmp_path: Path,
    model: str,
    world_size: int,
    layout: dict,
    precision: Precision,
) -> None:
    cut = LayoutConfig(name="case", **layout)
    batch = batch_of(cut, world_size)
    sent = _run(MODELS[model], cut, batch, world_size, corpus_prefix, tmp_path, precision)
    assert sent == _predicted(MODELS[model], cut, batch, world_size, precision)


# Gradients as Megatron is told to add them up: narrow in bf16, wide in fp16.
NARROW, WIDER = {"grad_reduce_in_bf16": True}, {"accumulate_allreduce_grads_in_fp32": True}
REPLICAS = {"tp": 2, "micro_batch": 4, "distributed_optimizer": True}
SUMMED = [
    ("dense", 4, {**WEIGHTS, "gather": "step"}, "bf16", NARROW),
    ("dense", 4, REPLICAS, "bf16", NARROW),
    ("moe", 8, {**WIDE, "ep": 4, "gather": "step", "distributed_optimizer": True}, "bf16", NARROW),
    ("dense", 8, {"tp": 2, "pp": 2, "micro_batch": 4}, "bf16", NARROW),
    ("dense", 4, {**WEIGHTS, "gather": "step"}, "fp16", WIDER),
    ("dense", 4, REPLICAS, "fp16", WIDER),
    ("dense", 4, REPLICAS, "bf16", {**NARROW, **WIDER}),
    ("untied", 4, FSDP2, "bf16", NARROW),
]


@pytest.mark.parametrize(
    ("model", "world_size", "layout", "precision", "told"),
    [pytest.param(*case, marks=THOROUGH if i > 1 else ()) for i, case in enumerate(SUMMED)],
    ids=str,
)
def test_gradients_go_in_the_precision_that_flags_say(
    corpus_prefix: Path,
    tmp_path: Path,
    model: str,
    world_size: int,
    layout: dict,
    precision: Precision,
    told: dict[str, bool],
) -> None:
    cut = LayoutConfig(name="case", **layout)
    batch = batch_of(cut, world_size)
    run = MODELS[model], cut, batch, world_size
    sent = _run(
        *run, corpus_prefix, tmp_path, precision, [word for name in told for word in switch(name)]
    )
    assert sent == _predicted(*run, precision, GradientFlags(**told))
    # Torch FSDP2 alone has gradients in the precision of the weights whatever it is told.
    assert (sent == _predicted(*run, precision)) == (cut.fsdp is not None)


@THOROUGH
@pytest.mark.parametrize(
    ("model", "layout"),
    list(product(QUICKSTART.models, QUICKSTART.layouts)),
    ids=lambda value: value.name,
)
def test_the_quickstart_sends_what_is_predicted(
    corpus_prefix: Path, tmp_path: Path, model: ModelConfig, layout: LayoutConfig
) -> None:
    batch, world_size = QUICKSTART.batch, QUICKSTART.world_size
    sent = _run(model, layout, batch, world_size, corpus_prefix, tmp_path)
    predicted = _predicted(model, layout, batch, world_size)
    if model.num_experts:
        take_routed(sent, _counted(tmp_path, world_size, "kept_bytes"), predicted, layout.ep)
    assert sent == predicted


def test_routing_moves_bytes_between_ranks_only(corpus_prefix: Path, tmp_path: Path) -> None:
    layout = LayoutConfig(name="routed", tp=4, ep=4, micro_batch=4)
    batch = batch_of(layout, 4)
    sent = _run(MODELS["routed"], layout, batch, 4, corpus_prefix, tmp_path)
    predicted = _predicted(MODELS["routed"], layout, batch, 4)
    take_routed(sent, _counted(tmp_path, 4, "kept_bytes"), predicted, layout.ep)
    assert sent == predicted


def take_routed(sent: list[Sent], kept: list[Sent], predicted: list[Sent], among: int) -> None:
    """Check what depends on routing ``among`` so many ranks, and take it out.

    How many rows a rank gets for its experts, and how many of its own it keeps, is up to the
    router, but every row comes from a rank and goes back: summed over the ranks what is sent and
    kept is what is predicted, and of a rank's own rows, half of its mean. The closed form rounds
    calls.
    """
    key = AXES["ep"], "all_to_all"
    moved, stayed, expected = ([r.pop(key, 0) for r in ranks] for ranks in (sent, kept, predicted))
    both = list(map(sum, zip(moved, stayed, strict=True)))
    whole = [of / share("all_to_all", among) for of in expected]
    assert sum(both) == pytest.approx(sum(whole), rel=1e-5)
    assert min(both) >= whole[0] / 2 * (1 - 1e-5)
    assert moved != pytest.approx(expected, rel=1e-5)  # it is not even loads that are seen

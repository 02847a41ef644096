"""A checkpoint is Megatron's own whatever layout saved it: every layout goes on from every other's.

Weights and optimizer state come back, so that the losses after loading are those of the run that
went on without an interruption.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_helix import pretrain_gpt
from megatron_helix.fuzz.session import CallFailed
from megatron_helix.launching import failures, fork_ranks
from megatron_helix.options import arguments
from tests.covering import THOROUGH, fast
from tests.distributed import (
    Curve,
    living_ranks,
    pretrain,
    pretrain_launched,
    run_distributed,
    tiny_gpt,
)

STEPS, SAVED_STEP = 4, 2

# As in test_parity.py: single precision, summed in another order.
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

# Every kind of parameter that attention has: weights and a bias cut in tiles, norms not cut at all.
MODEL = (
    *("--group-query-attention", "--num-query-groups", "2"),
    *("--qk-layernorm", "--normalization", "RMSNorm"),
)
# Tied embeddings in a pipeline are a bucket of their own, whose padding Megatron's fully
# reshardable format mistakes for parameters, whatever the layout: in a small model it loses some.
UNTIED = "--untie-embeddings-and-output-weights"
DISTRIBUTED_OPTIMIZER = (
    *("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", UNTIED),
)
OPTIMIZERS = {"whole": (), "distributed": DISTRIBUTED_OPTIMIZER}
LEARNABLE_OFFSET = ("--softmax-type", "learnable")

SP = "--sequence-parallel"
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "stock_tp4": (SP, "--tensor-model-parallel-size", "4"),
    "stock_tp4_without_sp": ("--tensor-model-parallel-size", "4"),
    "stock_tp2_pp2": (SP, "--tensor-model-parallel-size", "2", *PP2),
    # Also of other exchanges: a checkpoint knows nothing of them.
    "helix_2x2": (SP, "--helix-m", "2", "--helix-n", "2", "--helix-exchange", "weights"),
    "helix_4x1": (SP, "--helix-m", "4", "--helix-n", "1", "--helix-exchange", "activations"),
    "helix_2x1_dp2": (SP, "--helix-m", "2", "--helix-n", "1", "--helix-exchange", "scores"),
    "helix_2x1_pp2": (SP, "--helix-m", "2", "--helix-n", "1", *PP2),
}

Saved = Callable[..., tuple[Curve, Path]]
Resume = Callable[..., Curve]


@pytest.fixture(scope="module")
def saved(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run that saves on the way and at its end, and goes on; once for each layout and model."""
    runs: dict[tuple[str, ...], tuple[Curve, Path]] = {}

    def run(layout: str, *more: str) -> tuple[Curve, Path]:
        if (layout, *more) not in runs:
            folder = tmp_path_factory.mktemp("saved")
            save = ("--save", str(folder / "checkpoint"), "--save-interval", str(SAVED_STEP))
            flags = tiny_gpt(
                corpus_prefix, *MODEL, *LAYOUTS[layout], *more, *save, train_iters=STEPS
            )
            runs[(layout, *more)] = pretrain(flags, 4), folder / "checkpoint"
        return runs[(layout, *more)]

    return run


@pytest.fixture
def resume(corpus_prefix: Path) -> Resume:
    """A run that goes on from a checkpoint, by default from the one at :data:`SAVED_STEP`."""

    def run(checkpoint: Path, layout: str, *more: str, step: int = SAVED_STEP) -> Curve:
        load = ("--load", str(checkpoint), "--ckpt-step", str(step))
        flags = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS[layout], *load, *more, train_iters=STEPS)
        return pretrain(flags, 4)

    return run


def assert_goes_on(resumed: Curve, uninterrupted: Curve) -> None:
    """The steps after loading are the uninterrupted run's."""
    assert len(resumed.losses) == STEPS - SAVED_STEP
    losses, norms = uninterrupted.losses[SAVED_STEP:], uninterrupted.grad_norms[SAVED_STEP:]
    assert resumed.losses == pytest.approx(losses, rel=LOSS_TOLERANCE, abs=0)
    assert resumed.grad_norms == pytest.approx(norms, rel=GRAD_NORM_TOLERANCE, abs=0)


def tensors_in(checkpoint: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as Megatron puts it together on one rank."""
    folder = str(checkpoint / f"iter_{step:07d}")
    (content,) = run_distributed(lambda: load_plain_tensors(folder), 1)
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("stock_tp2_pp2", "helix_2x1_pp2"),
        ("helix_2x2", "stock_tp4"),
        # With Megatron's own norms instead of the plugin's.
        pytest.param("helix_2x2", "stock_tp4_without_sp", marks=THOROUGH),
        pytest.param("helix_2x2", "stock_tp2_pp2", marks=THOROUGH),
        pytest.param("helix_2x2", "helix_4x1", marks=THOROUGH),
        pytest.param("helix_2x2", "helix_2x2", marks=THOROUGH),
    ],
)
def test_one_layout_goes_on_from_anothers_checkpoint(
    saved: Saved, resume: Resume, first: str, then: str
) -> None:
    uninterrupted, checkpoint = saved(first)
    assert_goes_on(resume(checkpoint, then), uninterrupted)


@pytest.mark.parametrize("optimizer", fast(["distributed"], OPTIMIZERS))
def test_layouts_pass_a_checkpoint_on_bit_for_bit(
    saved: Saved, corpus_prefix: Path, tmp_path: Path, optimizer: str
) -> None:
    """Each loads what the last one saved, and saves it again at once: weights and moments."""
    kind = ("--bf16", *OPTIMIZERS[optimizer])
    _, checkpoint = saved("stock_tp2_pp2", *kind)
    expected = tensors_in(checkpoint, SAVED_STEP)
    # The weight, both moments of Adam, and the optimizer's own weight in single precision.
    assert sum("linear_qkv.weight" in key for key in expected) == 4
    for layout in ("helix_2x1_dp2", "helix_4x1", "stock_tp4"):
        flags = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS[layout], *kind)
        checkpoint = passed_on(checkpoint, tmp_path / layout, flags, 4)
        assert_same_bits(tensors_in(checkpoint, SAVED_STEP), expected)


def passed_on(checkpoint: Path, folder: Path, flags: list[str], ranks: int) -> Path:
    """The checkpoint that a layout saves of what it loads, without a step."""
    saved = folder / "checkpoint"
    load = ("--load", str(checkpoint), "--ckpt-step", str(SAVED_STEP))
    save = ("--save", str(saved), "--save-interval", str(SAVED_STEP + 1))
    until = ("--train-iters", str(SAVED_STEP))
    # The end of its schedule is that of a run of no steps.
    flags = [*flags, *load, *save, *until, "--override-opt-param-scheduler"]
    argv = pretrain_gpt.prepare(flags, ranks)
    living_ranks().call(pretrain_gpt.train, argv, ranks=ranks)
    return saved


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """As they are, under the same names."""
    assert found.keys() == expected.keys()
    changed = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not changed


# Three ranks divide neither the features of the MLP nor those of experts.
UNEVEN = (
    *("--num-attention-heads", "6", "--kv-channels", "12", "--ffn-hidden-size", "250"),
    *("--seq-length", "30", "--vocab-size", "270", "--make-vocab-size-divisible-by", "1"),
)
HELIX_3X1 = (SP, "--helix-m", "3", "--helix-n", "1", "--helix-split", "sequence")
UNEVEN_EXPERTS = (
    *("--disable-bias-linear", "--num-experts", "2", "--moe-ffn-hidden-size", "40"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-shared-expert-intermediate-size", "46", "--moe-layer-freq", "[0,1]"),
    # Stock takes experts' moments to no other degree, either.
    *("--no-save-optim", "--no-load-optim"),
)
UNEVEN_MODELS = {
    "biases": (),
    "gated": ("--swiglu", "--disable-bias-linear", *OPTIMIZERS["distributed"]),
    "gated_biases": ("--swiglu",),
    "experts": UNEVEN_EXPERTS,
    "gated_experts": ("--swiglu", *UNEVEN_EXPERTS),
}


@pytest.mark.parametrize("model", fast(["gated"], UNEVEN_MODELS))
def test_padding_of_features_is_in_no_checkpoint(
    corpus_prefix: Path, tmp_path: Path, model: str
) -> None:
    """From stock to helix, whose ranks do not divide the features, and back: bit for bit."""
    sizes = tiny_gpt(corpus_prefix, *MODEL, *UNEVEN, *UNEVEN_MODELS[model])
    stock = [*sizes, SP, "--tensor-model-parallel-size", "2", "--train-iters", str(STEPS)]
    save = ("--save", str(tmp_path / "checkpoint"), "--save-interval", str(SAVED_STEP))
    uninterrupted, first = pretrain([*stock, *save], 2), tmp_path / "checkpoint"
    checkpoint, expected = first, tensors_in(first, SAVED_STEP)
    # A weight and two moments; weights of a dense MLP, of an expert and of a shared one.
    assert sum("linear_fc1.weight" in key for key in expected) >= 3
    for layout, flags, ranks in (
        ("helix_3x1", [*sizes, *HELIX_3X1], 3),
        ("stock_tp1", sizes, 1),
    ):
        checkpoint = passed_on(checkpoint, tmp_path / layout, flags, ranks)
        assert_same_bits(tensors_in(checkpoint, SAVED_STEP), expected)
    if "experts" not in model:
        load = ("--load", str(first), "--ckpt-step", str(SAVED_STEP), "--train-iters", str(STEPS))
        assert_goes_on(pretrain([*sizes, *HELIX_3X1, *load], 3), uninterrupted)


def test_experts_go_on_beside_a_distributed_optimizer(saved: Saved, resume: Resume) -> None:
    """Experts have an optimizer of their own beside the one of all other weights."""
    moe = (
        *("--disable-bias-linear", "--num-experts", "4", "--moe-router-topk", "4"),
        *("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "none"),
        *("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"),
        *DISTRIBUTED_OPTIMIZER,
    )
    uninterrupted, checkpoint = saved("stock_tp4", *moe)
    assert_goes_on(resume(checkpoint, "helix_2x2", *moe), uninterrupted)


@THOROUGH
def test_a_learnable_softmax_offset_is_saved_once_and_loaded(saved: Saved, resume: Resume) -> None:
    """It is cut by head group only: the ranks of a dim group hold copies of it."""
    uninterrupted, checkpoint = saved("helix_2x2", *LEARNABLE_OFFSET)
    assert_goes_on(resume(checkpoint, "helix_2x2", *LEARNABLE_OFFSET), uninterrupted)
    offsets = [x for key, x in tensors_in(checkpoint, STEPS).items() if "softmax_offset" in key]
    assert offsets
    assert all(offset.shape[-1] == 4 for offset in offsets)  # one for each head


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Weights and both moments of Adam, under the same names and in the same order."""
    assert found.keys() == expected.keys()
    for part in ("linear_qkv.weight", "linear_proj.weight", "linear_qkv.bias"):
        assert sum(part in key for key in expected) == 3, part  # weight, two moments
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        # Adam divides a moment by the root of another: where a gradient is next to nothing, its
        # roundoff moves the weight by a part of the learning rate. A wrong order is of order one.
        error = (found[key] - tensor).abs().max() / tensor.abs().max()
        assert error <= 1e-3, f"{key}: off by {error:.1e} of its largest element"


def test_helix_goes_on_from_stock_and_then_saves_what_stock_does(
    saved: Saved, resume: Resume, tmp_path: Path
) -> None:
    uninterrupted, checkpoint = saved("stock_tp2_pp2")
    save = ("--save", str(tmp_path / "checkpoint"), "--save-interval", str(STEPS))
    assert_goes_on(resume(checkpoint, "helix_2x2", *save), uninterrupted)
    found, expected = tensors_in(tmp_path / "checkpoint", STEPS), tensors_in(checkpoint, STEPS)
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("optimizer", fast(["distributed"], OPTIMIZERS))
def test_stock_then_helix_then_stock_is_one_curve(
    saved: Saved, resume: Resume, tmp_path: Path, optimizer: str
) -> None:
    """Two steps each: the second one shows the optimizer state that came along."""
    longer = (*OPTIMIZERS[optimizer], "--train-iters", str(3 * SAVED_STEP))
    uninterrupted, first = saved("stock_tp2_pp2", *longer)
    second = tmp_path / "checkpoint"
    until = str(2 * SAVED_STEP)  # of the schedule of the whole curve, not a shorter one's end
    save = ("--save", str(second), "--save-interval", until, "--exit-interval", until)
    helix = resume(first, "helix_2x2", *longer, *save)
    assert sorted(folder.name for folder in second.glob("iter_*")) == [f"iter_{int(until):07d}"]
    stock = resume(second, "stock_tp4", *longer, step=2 * SAVED_STEP)
    assert [len(part.losses) for part in (helix, stock)] == [SAVED_STEP, SAVED_STEP]
    losses = uninterrupted.losses[:SAVED_STEP] + helix.losses + stock.losses
    norms = uninterrupted.grad_norms[:SAVED_STEP] + helix.grad_norms + stock.grad_norms
    assert losses == pytest.approx(uninterrupted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert norms == pytest.approx(uninterrupted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


# Degrees that divide neither heads nor head dimension. A sequence, features and a vocabulary that
# all of them share; of a head's eight rotary pairs three segments and five are not alike.
SHARED = (
    *(SP, "--seq-length", "60", "--max-position-embeddings", "60", "--ffn-hidden-size", "240"),
    *("--vocab-size", "300", "--make-vocab-size-divisible-by", "1"),
)
CHAIN = {
    2: ("--tensor-model-parallel-size", "2"),
    3: ("--helix-m", "3", "--helix-n", "1", "--helix-exchange", "weights"),
    5: ("--helix-m", "5", "--helix-n", "1", "--helix-exchange", "activations"),
    4: ("--tensor-model-parallel-size", "4"),
}


@THOROUGH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_chain_of_segments_that_are_not_alike_is_one_curve(
    corpus_prefix: Path, tmp_path: Path, optimizer: str
) -> None:
    """Two steps under each layout; and, saved again at once, the same bits under all."""
    known = (*MODEL, *SHARED, *OPTIMIZERS[optimizer])

    def flags(ranks: int, *more: str, until: int) -> list[str]:
        iters = str(len(CHAIN) * SAVED_STEP)  # of the schedule of the whole curve
        stop = ("--exit-interval", str(until))
        every = ("--train-iters", iters, *stop)
        return tiny_gpt(corpus_prefix, *known, *CHAIN[ranks], *more, *every)

    uninterrupted = pretrain(flags(2, until=100), 2)
    losses, norms, load = [], [], ()
    first = None
    for turn, ranks in enumerate(CHAIN, start=1):
        until, folder = turn * SAVED_STEP, str(tmp_path / f"{ranks}")
        save = ("--save", folder, "--save-interval", str(until))
        curve = pretrain(flags(ranks, *load, *save, until=until), ranks)
        losses += curve.losses
        norms += curve.grad_norms
        load = ("--load", folder)
        first = first or folder
    assert losses == pytest.approx(uninterrupted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert norms == pytest.approx(uninterrupted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)

    assert first is not None
    expected, checkpoint = tensors_in(Path(first), SAVED_STEP), first
    for ranks in (3, 5, 4):
        again = str(tmp_path / f"again{ranks}")
        more = ("--load", checkpoint, "--save", again, "--save-interval", "100")
        argv = pretrain_gpt.prepare(
            tiny_gpt(
                *(corpus_prefix, *known, *CHAIN[ranks], *more, "--override-opt-param-scheduler"),
                train_iters=SAVED_STEP,
            ),
            ranks,
        )
        living_ranks().call(pretrain_gpt.train, argv, ranks=ranks)
        found = tensors_in(Path(again), SAVED_STEP)
        assert found.keys() == expected.keys()
        changed = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not changed, f"{ranks} ranks: {changed}"
        checkpoint = again


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        (("--num-query-groups", "4"), "linear_qkv"),
        (("--num-layers", "4"), ""),
    ],
)
def test_a_checkpoint_of_another_model_shape_is_refused(
    saved: Saved, resume: Resume, other: tuple[str, ...], tensor: str
) -> None:
    _, checkpoint = saved("stock_tp2_pp2")
    shapes = rf"Global shape mismatch for loaded .* and expected .* for key .*{tensor}"
    with pytest.raises(CallFailed, match=shapes):
        resume(checkpoint, "helix_2x2", *other)


def test_a_checkpoint_of_other_heads_in_the_same_shapes_is_refused(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    """Twice the heads of half the channels: the tensors would fit, and mean something else."""
    checkpoint, few, many = str(tmp_path / "checkpoint"), ("4", "16"), ("8", "8")
    flags = ("--num-attention-heads", "--kv-channels")
    saving, loading = (
        [word for pair in zip(flags, sizes, strict=True) for word in pair] for sizes in (few, many)
    )
    save = ("--save", checkpoint, "--save-interval", "1")
    argv = tiny_gpt(corpus_prefix, *saving, *save, train_iters=1)
    pretrain(argv, 1)
    argv = tiny_gpt(corpus_prefix, *LAYOUTS["helix_2x2"], *loading, "--load", checkpoint)
    message = r"num_attention_heads value from checkpoint \(4\) is not equal .*\(8\)"
    with pytest.raises(CallFailed, match=message):
        pretrain(argv, 4)


def test_what_another_layout_would_read_wrongly_is_refused(
    saved: Saved, corpus_prefix: Path, tmp_path: Path
) -> None:
    """A distributed optimizer's state in the order of a rank's memory, and Megatron's old format.

    On as many ranks Megatron itself loads the first without a word, and trains on from it wrongly.
    """
    plain, by_rank = saved("helix_2x2")[1], ("--use-distributed-optimizer",)
    _, checkpoint = saved("stock_tp4", *by_rank)

    def complete(*flags: str) -> object:
        argv = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS["helix_2x2"], *flags)
        return arguments.complete(argv, 4)

    message = r"^--load: the optimizer state must be fully_reshardable .* it is dp_reshardable,.*"
    with pytest.raises(ValueError, match=message + "save with --dist-ckpt-optim-fully-reshardable"):
        complete("--load", str(checkpoint), *by_rank)
    complete("--load", str(checkpoint), *by_rank, "--no-load-optim")
    complete("--load", str(plain))
    complete("--load", str(tmp_path / "nothing yet"))

    old = tmp_path / "old" / f"iter_{STEPS:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    old.parent.mkdir(parents=True)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    for flag in ("--load", "--pretrained-checkpoint"):
        message = rf"^{flag}: a checkpoint under --helix-m > 1 must be in torch_dist format"
        with pytest.raises(ValueError, match=message):
            complete(flag, str(tmp_path / "old"))
    passing = ("--non-persistent-ckpt-type", "global", "--non-persistent-global-ckpt-dir")
    with pytest.raises(ValueError, match=r"^--non-persistent-ckpt-type: a checkpoint under"):
        complete("--load", str(plain), *passing, str(tmp_path / "old"))


@THOROUGH
def test_stock_goes_on_from_its_own_default_format(saved: Saved, resume: Resume) -> None:
    """That of a distributed optimizer, where Adam is torch's."""
    uninterrupted, checkpoint = saved("stock_tp4", "--use-distributed-optimizer")
    assert_goes_on(resume(checkpoint, "stock_tp4", "--use-distributed-optimizer"), uninterrupted)


def test_helix_saves_a_distributed_optimizer_for_every_layout(saved: Saved, resume: Resume) -> None:
    """Without being told; stock's default format is for the layout that saved it."""
    given = ("--use-distributed-optimizer", UNTIED)
    uninterrupted, checkpoint = saved("helix_2x2", *given)
    assert_goes_on(resume(checkpoint, "stock_tp4", *given), uninterrupted)


def test_an_asynchronous_save_is_the_same_checkpoint(saved: Saved) -> None:
    found = tensors_in(saved("helix_2x2", "--async-save")[1], STEPS)
    expected = tensors_in(saved("helix_2x2")[1], STEPS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_was_saved_before_a_rank_was_killed_still_loads(
    saved: Saved, resume: Resume, corpus_prefix: Path, tmp_path: Path
) -> None:
    """Killed where its shard is written and not yet on the disk: in the middle of a save."""
    uninterrupted, _ = saved("helix_2x2")
    checkpoint = tmp_path / "checkpoint"
    half_written = checkpoint / f"iter_{STEPS:07d}"

    def train_until_it_saves(argv: Sequence[str]) -> None:
        rank, to_disk = os.getpid(), os.fsync

        def fsync(file: int) -> None:
            if half_written.exists():
                os.kill(rank, signal.SIGKILL)
            to_disk(file)

        if os.environ["RANK"] == "1":
            os.fsync = fsync
        pretrain_gpt.train(argv)

    save = ("--save", str(checkpoint), "--save-interval", str(SAVED_STEP))
    flags = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS["helix_2x2"], *save, train_iters=STEPS)
    argv = pretrain_gpt.prepare(flags, 4)
    with pytest.raises(failures.RankFailed, match="rank 1 of 4 was killed by SIGKILL"):
        fork_ranks.run(
            fork_ranks.Ranks(
                target=train_until_it_saves, args=(argv,), world_size=4, logs=tmp_path / "logs"
            )
        )
    whole = {file.name for file in (checkpoint / f"iter_{SAVED_STEP:07d}").iterdir()}
    half = {file.name for file in half_written.iterdir()}
    assert any(name.startswith("__1_") for name in half), "killed before it wrote"
    assert {".metadata", "metadata.json"} <= whole
    assert not {".metadata", "metadata.json"} & half, "killed when all was written"
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == str(SAVED_STEP)
    assert_goes_on(resume(checkpoint, "helix_4x1"), uninterrupted)


def test_a_rank_reads_every_stored_tensor_once(
    saved: Saved, corpus_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = saved("stock_tp4")
    slice_file, log = FileSystemReader._slice_file, tmp_path / "reads"

    def counted(reader: FileSystemReader, file: Any, stored: Any) -> Any:
        name = next(index.fqn for index, place in reader.storage_data.items() if place is stored)
        if not name.startswith("common_state"):  # the flags: Megatron reads them beforehand, too
            with log.open("a") as lines:
                lines.write(f"{os.getpid()} {stored.relative_path} {stored.offset}\n")
        return slice_file(reader, file, stored)

    monkeypatch.setattr(FileSystemReader, "_slice_file", counted)
    load = ("--load", str(checkpoint), "--ckpt-step", str(SAVED_STEP))
    flags = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS["helix_2x2"], *load, train_iters=STEPS)
    pretrain_launched(flags, 4, tmp_path / "resumed")
    reads = Counter(log.read_text().splitlines())
    assert len({read.split()[0] for read in reads}) == 4
    assert set(reads.values()) == {1}

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
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_helix import pretrain_gpt
from megatron_helix.fuzz.session import CallFailed
from megatron_helix.launching import failures, fork_ranks
from megatron_helix.options import arguments
from tests.covering import THOROUGH, fast
from tests.distributed import Curve, pretrain, pretrain_launched, tiny_gpt
from tests.partition.checkpoint_case import (
    DISTRIBUTED_OPTIMIZER,
    FOR_EVERY_LAYOUT,
    GRAD_NORM_TOLERANCE,
    LAYOUTS,
    LEARNABLE_OFFSET,
    LOSS_TOLERANCE,
    MODEL,
    OPTIMIZERS,
    SAVED_STEP,
    STEPS,
    UNTIED,
    assert_goes_on,
    assert_same_bits,
    passed_on,
    tensors_in,
)

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


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ("distributed", ("helix_2x1_dp2", "stock_tp4")),
        *(
            pytest.param(name, ("helix_2x1_dp2", "helix_4x1", "stock_tp4"), marks=THOROUGH)
            for name in OPTIMIZERS
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_layouts_pass_a_checkpoint_on_bit_for_bit(
    saved: Saved, corpus_prefix: Path, tmp_path: Path, optimizer: str, layouts: tuple[str, ...]
) -> None:
    """Each loads what the last one saved, and saves it again at once: weights and moments."""
    kind = ("--bf16", *OPTIMIZERS[optimizer])
    _, checkpoint = saved("stock_tp2_pp2", *kind)
    expected = tensors_in(checkpoint, SAVED_STEP)
    # The weight, both moments of Adam, and the optimizer's own weight in single precision.
    assert sum("linear_qkv.weight" in key for key in expected) == 4
    for layout in layouts:
        flags = tiny_gpt(corpus_prefix, *MODEL, *LAYOUTS[layout], *kind)
        checkpoint = passed_on(checkpoint, tmp_path / layout, flags, 4)
        assert_same_bits(tensors_in(checkpoint, SAVED_STEP), expected)


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
    """Two steps each: the second one shows the optimizer state that came along.

    Helix saves that of a distributed optimizer for every layout without being told.
    """
    longer = (*OPTIMIZERS[optimizer], "--train-iters", str(3 * SAVED_STEP))
    untold = [word for word in longer if word != FOR_EVERY_LAYOUT]
    uninterrupted, first = saved("stock_tp2_pp2", *longer)
    second = tmp_path / "checkpoint"
    until = str(2 * SAVED_STEP)  # of the schedule of the whole curve, not a shorter one's end
    save = ("--save", str(second), "--save-interval", until, "--exit-interval", until)
    helix = resume(first, "helix_2x2", *untold, *save)
    assert sorted(folder.name for folder in second.glob("iter_*")) == [f"iter_{int(until):07d}"]
    stock = resume(second, "stock_tp4", *longer, step=2 * SAVED_STEP)
    assert [len(part.losses) for part in (helix, stock)] == [SAVED_STEP, SAVED_STEP]
    losses = uninterrupted.losses[:SAVED_STEP] + helix.losses + stock.losses
    norms = uninterrupted.grad_norms[:SAVED_STEP] + helix.grad_norms + stock.grad_norms
    assert losses == pytest.approx(uninterrupted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert norms == pytest.approx(uninterrupted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        (("--num-query-groups", "4"), "linear_qkv"),
        pytest.param(("--num-layers", "4"), "", marks=THOROUGH),
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
    load = ("--load", checkpoint, "--override-opt-param-scheduler")
    argv = tiny_gpt(corpus_prefix, *LAYOUTS["helix_2x2"], *loading, *load)
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
    checkpoint = tmp_path / "checkpoint"
    save = ("--save", str(checkpoint), "--save-interval", "1")
    pretrain(tiny_gpt(corpus_prefix, *MODEL, *by_rank, *save, train_iters=1), 1)

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


@THOROUGH
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
    _, checkpoint = saved("stock_tp2_pp2")
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

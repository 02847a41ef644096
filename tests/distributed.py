"""A function, or Megatron's training loop, on forked gloo ranks; what they found comes back."""

import atexit
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_helix import pretrain_gpt
from megatron_helix.experiment import metrics
from megatron_helix.fuzz.session import Session
from megatron_helix.launching import failures, fork_ranks
from megatron_helix.recording import record
from megatron_helix.upstream import patches

TIMEOUT_S = 180.0  # of one distributed test; a hang becomes a failure instead of a stuck suite
LOG_TAIL_LINES = 40
RANKS = 8  # the most that nearly every test wants


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``fn(*args)`` on ``world_size`` of :func:`living_ranks`; its results in rank order.

    ``fn`` may be a closure. Random numbers start from one state on every rank. More ranks than
    live are started for it alone.
    """
    call = cloudpickle.dumps((fn, args))
    if world_size <= RANKS:
        return living_ranks().call(_call, call, ranks=world_size, timeout_s=TIMEOUT_S)
    with (
        tempfile.TemporaryDirectory(prefix="helix-test-") as name,
        Session(world_size, Path(name)) as session,
    ):
        return session.call(_call, call, ranks=world_size, timeout_s=TIMEOUT_S)


def _call(call: bytes) -> Any:
    fn, args = cloudpickle.loads(call)
    torch.manual_seed(0)
    result = fn(*args)
    dist.barrier()  # no rank is done while another still talks to it
    return result


def launch_ranks(target: Callable[..., Any], args: tuple, world_size: int, logs: Path) -> None:
    """Fork the ranks; when one fails, the test fails with the end of that rank's output."""
    ranks = fork_ranks.Ranks(target=target, args=args, world_size=world_size, logs=logs)
    try:
        fork_ranks.run(ranks, timeout_s=TIMEOUT_S)
    except failures.RankFailed as failure:
        raise AssertionError(f"{failure}\n{_log_tail(ranks, failure.rank)}") from None
    except TimeoutError as hang:
        tails = "\n".join(_log_tail(ranks, rank) for rank in range(world_size))
        raise AssertionError(f"{hang}\n{tails}") from None


def _log_tail(ranks: fork_ranks.Ranks, rank: int) -> str:
    log = ranks.log(rank)
    lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
    # A fork's stack starts with pytest's own, which says nothing.
    lines = [line for line in lines if "/_pytest/" not in line and "/pluggy/" not in line]
    return "\n".join([f"--- rank {rank} ---", *lines[-LOG_TAIL_LINES:]])


@contextlib.contextmanager
def model_parallel(tp: int = 1, pp: int = 1, ep: int = 1) -> Iterator[None]:
    """Megatron's ``parallel_state`` and random states inside a rank of :func:`run_distributed`."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else None,
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@cache
def living_ranks() -> Session:
    """Ranks that live as long as this process: a call costs a fraction of a launch."""
    pretrain_gpt.make_ready("cpu")
    folder = tempfile.mkdtemp(prefix="helix-test-ranks-")
    session = Session(RANKS, Path(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(session.end)
    return session


@dataclass
class Curve:
    """What the steps of a training said: to a rank, or to all of them together.

    Attributes:
        losses: of every step; on ranks before the last pipeline stage none.
        grad_norms: of every step that was not skipped.
        loss_scales: after every step; None without loss scaling.
        skipped_steps: updates that overflowed and were left out.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loss_scales: list[float | None] = field(default_factory=list)
    skipped_steps: int = 0

    def note(self, result: Any, optimizer: Any) -> None:
        """What Megatron's ``train_step`` returned on this rank."""
        losses, skipped, *_, grad_norm, _zeros, _logit = result
        self.losses += [float(losses["lm loss"])] if "lm loss" in losses else []
        self.grad_norms += [] if grad_norm is None else [float(grad_norm)]
        self.loss_scales.append(record.loss_scale(optimizer))
        self.skipped_steps += bool(skipped)


def pretrain(flags: Sequence[str], world_size: int) -> Curve:
    """Train with these flags, on ranks as :func:`run_distributed` has them."""
    argv = pretrain_gpt.prepare(flags, world_size)
    return _together(run_distributed(train, world_size, argv))


Look = Callable[[list[Any], Curve], None]  # at the model, and what its training said until now


def train(argv: list[str], *, before: Look | None = None, after: Look | None = None) -> Curve:
    """Train on this rank with completed flags, and look at the model around every step."""
    curve = Curve()

    def observed(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if before:
            before(args[2], curve)
        result = train_step(*args, **kwargs)
        curve.note(result, optimizer=args[3])
        if after:
            after(args[2], curve)
        return result

    patches.observe_train_step(observed)
    try:
        pretrain_gpt.train(argv)
    except SystemExit as ended:  # --exit-interval
        if ended.code:
            raise
    return curve


def _together(ranks: list[Curve]) -> Curve:
    """With the losses of a rank that has them, and the other figures, on which all agree."""
    curve = ranks[-1]
    for one in ranks:
        assert one == curve or one == dataclasses.replace(curve, losses=[])
    return curve


def measured(flags: Sequence[str], world_size: int, folder: Path) -> metrics.RunMetrics:
    """The same with a ledger; what it counted lies in ``folder / "metrics"``."""
    if world_size > RANKS:
        return pretrain_launched(flags, world_size, folder)
    argv = _recorded(flags, world_size, folder)
    living_ranks().call(pretrain_gpt.train, argv, ranks=world_size, timeout_s=TIMEOUT_S)
    return metrics.read(folder / "metrics")


def pretrain_launched(flags: Sequence[str], world_size: int, folder: Path) -> metrics.RunMetrics:
    """The same on ranks of its own, which see what a test has changed in this process.

    Their output is in ``folder / "logs"``.
    """
    argv = _recorded(flags, world_size, folder)
    launch_ranks(pretrain_gpt.train, (argv,), world_size, folder / "logs")
    return metrics.read(folder / "metrics")


def _recorded(flags: Sequence[str], world_size: int, folder: Path) -> list[str]:
    recorded = ("--helix-metrics", str(folder / "metrics"))
    return pretrain_gpt.prepare([*flags, *recorded], world_size)


def tiny_gpt(corpus_prefix: Path, *extra: str, train_iters: int = 3) -> list[str]:
    """Flags of the smallest GPT that every layout of four ranks can cut, and of its training."""
    return [
        *("--helix-device", "cpu", "--num-layers", "2", "--hidden-size", "64"),
        *("--num-attention-heads", "4", "--kv-channels", "16", "--ffn-hidden-size", "256"),
        *("--seq-length", "32", "--max-position-embeddings", "32"),
        *("--micro-batch-size", "4", "--global-batch-size", "8"),
        *("--train-iters", str(train_iters), "--lr", "1e-3", "--min-lr", "1e-4"),
        *("--data-path", str(corpus_prefix), "--split", "100,0,0", "--num-workers", "0"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
        *("--null-tokenizer-eod-id", "0", "--make-vocab-size-divisible-by", "16"),
        *("--log-interval", "1", "--eval-iters", "0", "--eval-interval", "1000"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--position-embedding-type", "rope"),
        *extra,
    ]

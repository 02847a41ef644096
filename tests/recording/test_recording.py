"""What a run writes down, when it is restarted, counted in samples, or not alone in its folder."""

import json
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_helix import pretrain_gpt
from megatron_helix.basics import files
from megatron_helix.experiment import metrics
from megatron_helix.inference import measure
from megatron_helix.recording import rank_files
from megatron_helix.verification import verify
from tests.distributed import pretrain_launched, tiny_gpt

TAKEN = r"^--helix-metrics: must be a folder that no other run writes into, and one holds .*;"


def lines(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """All that a rank has ever written."""
    return [
        json.loads(text) for text in files.of_rank(folder, rank, ".jsonl").read_text().splitlines()
    ]


@contextmanager
def another(work: Callable[[Any], None]) -> Iterator[Any]:
    """A process that has done ``work`` and lives on; killed in the end."""
    context = mp.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there,))
    process.start()
    assert here.recv() == "done"
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_a_second_run_in_the_folder_is_refused(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = tiny_gpt(corpus_prefix, "--helix-metrics", str(tmp_path))

    def write(told: Any) -> None:
        file = rank_files.append(tmp_path, 0)
        told.send("done")
        signal.pause()
        file.close()

    with another(write):
        with pytest.raises(ValueError, match=TAKEN):
            pretrain_gpt.prepare(flags, 1)
        with pytest.raises(ValueError, match=TAKEN):
            rank_files.append(tmp_path, 0)
        rank_files.append(tmp_path, 1).close()
    pretrain_gpt.prepare(flags, 1)  # it is gone, killed


def test_a_worker_that_outlives_its_rank_keeps_no_restart_out(tmp_path: Path) -> None:
    def write(told: Any) -> None:
        file = rank_files.append(tmp_path, 0)
        if os.fork() == 0:
            signal.alarm(60)
            signal.pause()
        told.send("done")
        signal.pause()
        file.close()

    with another(write):
        pass
    rank_files.require_free(tmp_path, 0)


def test_a_restart_writes_on_behind_whole_lines(tmp_path: Path) -> None:
    path = files.of_rank(tmp_path, 0, ".jsonl")
    for there, kept in (("", ""), ('{"a": 1}\n{"b', '{"a": 1}\n'), ('{"b', "")):
        path.write_text(there)
        with rank_files.append(tmp_path, 0) as file:
            file.write("{}\n")
        assert path.read_text() == kept + "{}\n"


def test_a_restart_keeps_what_the_run_before_measured(corpus_prefix: Path, tmp_path: Path) -> None:
    whole = pretrain_launched(tiny_gpt(corpus_prefix, train_iters=5), 2, tmp_path / "whole")
    saved = ("--save", str(tmp_path / "saved"), "--save-interval", "2")
    parts = tmp_path / "parts"
    # It ends behind its checkpoint of step 2, as a run that dies does.
    pretrain_launched(
        tiny_gpt(corpus_prefix, *saved, "--exit-interval", "3", train_iters=5), 2, parts
    )
    load = ("--load", str(tmp_path / "saved"), "--ckpt-step", "2", "--helix-profile")
    gone_on = pretrain_launched(tiny_gpt(corpus_prefix, *load, train_iters=5), 2, parts)
    assert gone_on.losses == whole.losses
    assert gone_on.grad_norms == whole.grad_norms
    for rank in (0, 1):
        told = lines(parts / "metrics", rank)
        assert [line["iteration"] for line in told] == [1, 2, 3, 3, 4, 5]
        assert [line["first"] for line in told] == [True, False, False, True, False, False]
        assert ["profile" in line for line in told] == [False] * 5 + [True]


def test_a_run_counted_in_samples_profiles_its_last_step(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    flags = tiny_gpt(corpus_prefix, "--train-samples", "24", "--helix-profile")
    at = flags.index("--train-iters")
    pretrain_launched([*flags[:at], *flags[at + 2 :]], 1, tmp_path)
    assert ["profile" in line for line in lines(tmp_path / "metrics")] == [False, False, True]


def test_every_step_says_its_own_batch(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = tiny_gpt(corpus_prefix, "--train-samples", "24")
    for name in ("--train-iters", "--global-batch-size"):
        at = flags.index(name)
        flags = [*flags[:at], *flags[at + 2 :]]
    pretrain_launched([*flags, "--step-batch-size-schedule", "0:4 256:8"], 1, tmp_path)
    told = lines(tmp_path / "metrics")
    assert [line["batch"] for line in told] == [4, 4, 8, 8]
    assert [line["tokens"] for line in told] == [32 * line["batch"] for line in told]


def test_files_of_ranks_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    ranks = [0, 1, 2, 10, 11, 99, 100, 101]
    for rank in reversed(ranks):
        placed = {"rank": rank, "times_s": [[0.0, 1.0, 2.0]], "batch": 1, "communication_s": 0.0}
        known = {"kv_bytes": rank, "sent_bytes": {}, "kept_bytes": {}, "prefill_sent_bytes": {}}
        files.of_rank(tmp_path, rank, ".json").write_text(json.dumps({**placed, **known}))
    (tmp_path / "rank_of_nobody.json").write_text("{}")
    assert [int(path.stem[4:]) for path in files.of_ranks(tmp_path, ".json")] == ranks
    assert [rank["rank"] for rank in verify.placements(tmp_path)] == ranks
    assert measure.read(tmp_path).kv_bytes == ranks
    assert metrics.steps_done(tmp_path) == 0


def test_on_a_gpu_nothing_keeps_a_step_from_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is first called under a counter of torch's stays uncompiled, and slow."""
    from megatron_helix.recording.record import flop_counter

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as ranks on CPUs have it
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def called_under(counter: AbstractContextManager | None) -> bool:
        compiled.clear()
        function = torch.compile(lambda x: x.sin() * x, backend=backend)
        with counter or nullcontext():
            function(torch.ones(3))
        function(torch.ones(3))
        return bool(compiled)

    assert called_under(flop_counter(on_gpu=True))
    assert not called_under(flop_counter(on_gpu=False))

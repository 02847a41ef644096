"""``benchmarks/one_rank``: what can be held without a GPU. The stand-in itself runs on one only."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, torchrun
from megatron_helix.machine import hardware
from megatron_helix.options import arguments
from tests.script_module import ROOT, script_module

EXPERIMENT = "configs/experiments/two_gpus_rivals.yaml"


def test_links_are_the_hardwares() -> None:
    run = script_module("benchmarks/one_rank/run.py")
    link = hardware.load(ROOT / "configs/hardware/h200_2.yaml").intra_node
    rates = run.link_rates(link)
    kernels = (ROOT / "benchmarks/one_rank/nccl.cu").read_text()
    for kind in run.RATES:
        name = f"ONE_RANK_{kind.upper()}_GBPS"
        assert float(rates[name]) * 1e9 == pytest.approx(link.of(kind).bandwidth.rate)
        assert f'setting("{name}"' in kernels


def test_without_links() -> None:
    with pytest.raises(UserError, match="intra_node must be given"):
        script_module("benchmarks/one_rank/run.py").link_rates(None)


def test_without_a_gpu(tmp_path) -> None:
    words = [sys.executable, "benchmarks/one_rank/run.py", EXPERIMENT, "dense_8192", "dp2"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*words, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=hidden
    )
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: benchmarks/one_rank: needs a GPU, and torch sees none"


@pytest.mark.parametrize(("phase", "profile"), [("train", True), ("prefill", False)])
def test_what_a_turn_runs_and_reads(monkeypatch, tmp_path, phase: str, profile: bool) -> None:
    run = script_module("benchmarks/one_rank/run.py")
    chosen = config.load(ROOT / EXPERIMENT)
    words = torchrun.command(chosen, "dense_8192", "dp2")
    given = run.rank_environment(chosen, words, tmp_path / "lib.so")
    assert given["LD_PRELOAD"] == str(tmp_path / "lib.so")
    began = []

    def log(command, stdout, env, **_: object) -> SimpleNamespace:
        began.append((command[2:], env))
        for ms in (99, 9, 9, 3, 1, 2, 50, 60):
            stdout.write(f"elapsed time per iteration (ms): {ms}.0 | max allocated: {ms}000.0\n")
        gate = Path(env["ONE_RANK_GATE"])
        assert not gate.exists()
        return SimpleNamespace(wait=lambda: 0 if gate.exists() else 1, poll=lambda: 0)

    monkeypatch.setattr(run.subprocess, "Popen", log)
    (tmp_path / "go").touch()  # of a call before
    turn = run.Turn("dp2", tmp_path, 8, profile, run.flags(words, 8, phase))
    turn.begin(given)
    turn.begin(given)  # has begun
    row = turn.row()
    assert (row.ms, row.gb) == ((2.0, 99.0) if profile else (3.0, 99.0))
    ((flags, _),) = began
    assert ("--profile" in flags) == profile
    assert ("--helix-phase" in flags) == ("--helix-metrics" in flags) == (phase == "prefill")
    flags[flags.index("--helix-device") + 1] = "cpu"  # the one thing that this machine lacks
    assert flags[-1] in arguments.complete(flags, 2)


def test_words_of_other_ranks(monkeypatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers.VocabParallelEmbedding, "forward", lambda _, words: words)
    script_module("benchmarks/one_rank/rank.py").own_words()
    embedding = SimpleNamespace(num_embeddings_per_partition=4)
    looked_up = layers.VocabParallelEmbedding.forward(embedding, torch.arange(8))
    assert looked_up.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]

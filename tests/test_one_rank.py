"""``benchmarks/one_rank``: what can be held without a GPU. The stand-in itself runs on one only."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from megatron_helix import corpus
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import config, torchrun
from megatron_helix.machine import hardware
from megatron_helix.options import arguments
from megatron_helix.run_config.batch import BatchConfig
from tests.covering import THOROUGH
from tests.script_module import ROOT, script_module

EXPERIMENT = "configs/experiments/two_gpus_rivals.yaml"
PACKED = "configs/experiments/two_gpus_packed.yaml"
# A rank that also says of each row the sum of its words and where its documents end. Fake groups
# have no timeout.
REHEARSED = """
import datetime, sys
from megatron_helix.upstream import cpu_device
cpu_device.enable()
from megatron_helix.partition import process_groups
from megatron_helix.upstream import gpt_training
process_groups._timeout = lambda group: datetime.timedelta(minutes=1)
packed = gpt_training._packed
def told(batch):
    print("row:", [int(batch["tokens"].sum()), *batch["cu_seqlens"].flatten().tolist()], flush=True)
    return packed(batch)
gpt_training._packed = told
sys.path.insert(0, "benchmarks/one_rank")
import rank
rank.main()
"""


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0,2"], r"--ranks: must be numbers below .* world_size \(2\), .* got '0,2'"),
        (["--ranks", ""], "--ranks: must be numbers below .* got ''"),
        (["--micro-batch", "3"], r"dp2: micro_batch x data-parallel ranks: must be a .* divisor"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, words: list[str], said: str) -> None:
    ended = called(monkeypatch, "dp2", *words)
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert re.search(said, line)


def called(monkeypatch, *words: str) -> Result:
    """``run.py`` on packed rows, with no GPU to compile for and a log for each rank."""
    run = script_module("benchmarks/one_rank/run.py")
    monkeypatch.setattr(run, "build", lambda folder: folder / "lib.so")
    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, [str(ROOT / PACKED), "qwen_8", *words])


class Ranks:
    """Processes that only write a log: of rank 1 every other step takes longer than of rank 0."""

    def __init__(self, monkeypatch) -> None:
        self.began: list[tuple[list[str], dict[str, str]]] = []
        monkeypatch.setattr("subprocess.Popen", self.begin)

    def begin(self, command, stdout, env, **_: object) -> SimpleNamespace:
        self.began.append((command[2:], env))
        first = env["RANK"] == "0"
        for ms in (99, 98, 97, *((3, 1, 2) if first else (1, 4, 2)), 50, 60):
            stdout.write(f"elapsed time per iteration (ms): {ms}.0 | max allocated: {ms}000.0\n")
        if not first:
            stdout.write("max allocated: 100000.0\n")
        gate = Path(env["ONE_RANK_GATE"])
        assert not gate.exists()
        return SimpleNamespace(wait=lambda: 0 if gate.exists() else 1, poll=lambda: 0)


@pytest.mark.parametrize(("phase", "profile"), [("train", True), ("prefill", False)])
def test_what_a_turn_runs_and_reads(monkeypatch, tmp_path, phase: str, profile: bool) -> None:
    run = script_module("benchmarks/one_rank/run.py")
    chosen = config.load(ROOT / EXPERIMENT)
    words = torchrun.command(chosen, "dense_8192", "dp2")
    given = run.rank_environment(chosen, words, tmp_path / "lib.so")
    assert given["LD_PRELOAD"] == str(tmp_path / "lib.so")
    ranks = Ranks(monkeypatch)
    (tmp_path / "go").touch()  # of a call before
    (tmp_path / "metrics").mkdir()
    own = run.flags(words, 8, phase)
    turn = run.Turn(name="dp2", rank=1, folder=tmp_path, steps=8, profile=profile, flags=own)
    turn.begin(given)
    turn.begin(given)  # has begun
    assert not (tmp_path / "metrics").exists()
    taken = turn.taken()
    assert taken.steps == ([1, 4, 2] if profile else [1, 4, 2, 50, 60])
    assert taken.gb == 100
    ((flags, env),) = ranks.began
    assert env["RANK"] == "1"
    assert ("--profile" in flags) == profile
    assert not profile or value(flags, "--profile-ranks") == "1"
    assert ("--helix-phase" in flags) == ("--helix-metrics" in flags) == (phase == "prefill")
    flags[flags.index("--helix-device") + 1] = "cpu"  # the one thing that this machine lacks
    assert flags[-1] in arguments.complete(flags, 2)


def value(flags: list[str], flag: str) -> str:
    """The last one, which wins."""
    return flags[len(flags) - flags[::-1].index(flag)]


def test_a_step_takes_as_long_as_on_its_slowest_rank(monkeypatch, tmp_path) -> None:
    ranks = Ranks(monkeypatch)
    words = ["--ranks", "0,1", "--steps", "6", "--out", str(tmp_path), "--layers", "2"]
    words += ["--sequences", "8", "--sequence-length", "4096", "--micro-batch", "2"]
    words += ["--flags", "--grad-reduce-in-bf16 --lr 0.5"]
    ended = called(monkeypatch, "dp2", "helix_2x1_step", *words)
    assert ended.exit_code == 0, ended.output
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [row["layout"] for row in rows] == ["dp2", "helix_2x1_step"]
    for row in rows:
        # Steps (3, 1, 2) and (1, 4, 2): the slowest are (3, 4, 2).
        assert (row["ranks"], row["ms"], row["gb"]) == ([0, 1], 3, 100)
    assert "one rank alone (0, 1), links modelled: 2 layers, 8 x 4096 tokens" in ended.stdout
    assert [env["RANK"] for _, env in ranks.began] == ["0", "1"] * 2
    for flags, _ in ranks.began:
        assert value(flags, "--num-layers") == "2"
        assert value(flags, "--global-batch-size") == "8"
        assert value(flags, "--seq-length") == value(flags, "--max-position-embeddings") == "4096"
        assert value(flags, "--micro-batch-size") == "2"
        assert value(flags, "--lr") == "0.5"
        assert Path(value(flags, "--data-path")).with_suffix(".bin").exists()
        assert {"--grad-reduce-in-bf16", "--dataloader-inter-document-masking"} <= {*flags}


def test_a_layout_of_which_a_rank_failed_has_no_row() -> None:
    run = script_module("benchmarks/one_rank/run.py")
    one = run.Taken(steps=[1.0], gb=1.0, kinds={})
    assert run.Row.of([one, None]) == run.Row()
    assert run.Row.of([one]) == run.Row(1.0, 1.0)


@THOROUGH
def test_the_second_rank_trains_alone_on_rows_of_its_own(tmp_path) -> None:
    """Data parallelism has it read every other row, tensor parallelism all."""
    chosen = config.load(ROOT / PACKED)
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16}
    heads = {"num_attention_heads": 4, "num_query_groups": 2}
    small = {
        "models": [chosen.models[0].model_copy(update={**sizes, **heads})],
        "batch": BatchConfig(sequences=4, sequence_length=256),
        **{"device": "cpu", "precision": "fp32", "hardware": None},
    }
    chosen = chosen.model_copy(update=small)
    for size in range(90, 400, 10):
        (tmp_path / f"{size}.txt").write_text(chr(64 + size % 61) * size)
    data = str(tmp_path / "data")
    corpus.build([tmp_path], Path(data), pattern="*.txt")
    run = script_module("benchmarks/one_rank/run.py")
    begun = {}
    for layout in ("dp2", "helix_2x1_step"):
        words = torchrun.command(chosen, "qwen_8", layout, data=data)
        command = [sys.executable, "-c", REHEARSED, *run.flags(words, 2, "train")]
        env = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
        where = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command += ["--data-cache-path", str(tmp_path / layout)]
        begun[layout] = subprocess.Popen(command, text=True, **where)
    rows = {}
    for layout, process in begun.items():
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert len(re.findall("elapsed time per iteration", said)) == 2
        assert "[Rank 1]" in said
        assert "max allocated" in said
        rows[layout] = [json.loads(row) for row in re.findall("^row: (.*)$", said, re.MULTILINE)]
    assert len(rows["helix_2x1_step"]) == 8
    assert any(len(row) > 3 for row in rows["helix_2x1_step"])
    assert rows["dp2"] == rows["helix_2x1_step"][1::2]


def test_words_of_other_ranks(monkeypatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers.VocabParallelEmbedding, "forward", lambda _, words: words)
    script_module("benchmarks/one_rank/rank.py").own_words()
    embedding = SimpleNamespace(num_embeddings_per_partition=4, vocab_start_index=4)
    looked_up = layers.VocabParallelEmbedding.forward(embedding, torch.arange(8))
    assert looked_up.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]

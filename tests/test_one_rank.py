"""``benchmarks/one_rank``: what can be held without a GPU. The stand-in itself runs on one only."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_helix.basics.errors import UserError
from megatron_helix.machine import hardware
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


def test_words_of_other_ranks(monkeypatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers.VocabParallelEmbedding, "forward", lambda _, words: words)
    script_module("benchmarks/one_rank/rank.py").own_words()
    embedding = SimpleNamespace(num_embeddings_per_partition=4)
    looked_up = layers.VocabParallelEmbedding.forward(embedding, torch.arange(8))
    assert looked_up.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]

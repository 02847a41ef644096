"""Layouts that share out weights, as the commands print them."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_helix.cli import app

RIVALS = "configs/experiments/two_gpus_rivals.yaml"
LONG = "configs/experiments/two_gpus_long.yaml"


def said(*words: str) -> str:
    """What a command prints, which ends well."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("file", "model", "layout", "start", "flag"),
    [
        (RIVALS, "dense_8192", "tp2", "torchrun", "--sequence-parallel"),
        (RIVALS, "dense_8192", "torch_fsdp2", "CUDA_DEVICE_MAX_CONNECTIONS=8", "--use-torch-fsdp2"),
        (RIVALS, "dense_8192", "megatron_fsdp", "CUDA_DEVICE_MAX_CONNECTIONS=8", "fsdp_dtensor"),
        (RIVALS, "dense_8192", "gtp2", "CUDA_DEVICE_MAX_CONNECTIONS=8", "num-weight-shards 2"),
        (LONG, "qwen_8", "cp2_a2a", "torchrun", "--cp-comm-type a2a"),
    ],
)
def test_a_launch_says_the_flags_and_the_environment(
    file: str, model: str, layout: str, start: str, flag: str
) -> None:
    printed = said("launch", file, model, layout, "--dry-run")
    assert printed.startswith(f"{start} ")
    assert flag in printed


def test_a_plan_compares_them() -> None:
    words = ["plan", "--model", "configs/models/dense.yaml", "--batch", "16", "--json"]
    words += ["--hardware", "configs/hardware/h200_2.yaml"]
    asked = ("tp=1,fsdp=megatron_fsdp,micro_batch=8", "tp1_gtp2_mb8", "tp1_pp2_mb2")
    document: dict[str, Any] = json.loads(
        said(*words, "--precision", "bf16", *(w for a in asked for w in ("--layout", a)))
    )
    names = [row["layout"] for row in document["layouts"]]
    assert names == ["tp1_megatron_fsdp_mb8", "tp1_gtp2_mb8", "tp1_pp2_mb2"]
    refused = CliRunner().invoke(app, [*words, "--precision", "fp32"])
    assert isinstance(refused.exception, ValueError)
    assert "--precision: must be fp16, which" in str(refused.exception)

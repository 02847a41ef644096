"""What Megatron-LM's script obeys and is not here: said in a line, before any process."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_helix.options import parsed, unavailable
from tests.distributed import tiny_gpt

PP2 = ("--pipeline-model-parallel-size", "2")
FULL = ("--full-validation", "--multiple-validation-sets")
MASKED = "--dataloader-inter-document-masking"

# Flags, what is said of the first of them, and other flags beside which it is not said.
CASES = {
    "post-training": (("--modelopt-enabled",), "needs megatron.post_training", None),
    "reinforcement learning": (("--perform-rl-step",), "needs megatron.rl", None),
    "a YAML file": (("--yaml-cfg", "x.yaml"), "takes the place of the command line", None),
    "conversations in words": (
        ("--sft", "--tokenizer-type", "TikTokenizer"),
        "needs a tokenizer of conversations",
        ("--sft", "--tokenizer-type", "SFTTokenizer"),
    ),
    "conversations in fewer than all bytes": (
        ("--sft", "--vocab-size", "100"),
        "reads conversations as bytes",
        ("--sft",),
    ),
    "conversations with masks": (
        ("--sft", "--reset-position-ids"),
        "packs rows without masks",
        ("--sft",),
    ),
    "middles of numbers": (
        ("--fim-data",),
        "needs a tokenizer that can leave special tokens out",
        ("--fim-data", "--tokenizer-type", "TikTokenizer"),
    ),
    "documents in a planned pass": (
        (MASKED, "--overlap-moe-expert-parallel-comm"),
        "tells where documents end",
        (MASKED,),
    ),
    "documents apart by ranks": (
        ("--hybrid-context-parallel", "--transformer-impl", "local"),
        "cuts documents over ranks",
        ("--hybrid-context-parallel", "--transformer-impl", "transformer_engine"),
    ),
    "several packed rows through a pipeline": (
        (MASKED, *PP2),
        "packs a micro-batch into one row",
        (MASKED, *PP2, "--micro-batch-size", "1"),
    ),
    "one packed row in training, several in validation": (
        (MASKED, *PP2, "--micro-batch-size", "1", "--eval-micro-batch-size", "2"),
        "packs a micro-batch into one row",
        (MASKED, *PP2, "--micro-batch-size", "1"),
    ),
    "one set in full": (("--full-validation",), "counts a list of validation sets", FULL),
    "several sets in part": (("--multiple-validation-sets",), "is for validation in full", FULL),
    "validation in full beside test data": (
        (*FULL, "--split", "90,5,5"),
        "counts test data as a list",
        FULL,
    ),
    "validation in full through a pipeline": (
        (*FULL, *PP2),
        "reads sequences one by one",
        (*FULL, *PP2, "--eval-micro-batch-size", "1"),
    ),
    "a GPU's memory": (
        ("--record-memory-history",),
        "asks a GPU what it does",
        ("--record-memory-history", "--helix-device", "cuda"),
    ),
    "a process that saves": (
        ("--use-persistent-ckpt-worker",),
        "saves from a process of its own",
        ("--use-persistent-ckpt-worker", "--helix-device", "cuda"),
    ),
}
PACKAGES = {
    "--sft": ("transformers",),
    "--logits-load-dir": ("zstandard",),
    "--inprocess-restart": ("nvidia_resiliency_ext",),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package that can be asked for is there."""
    monkeypatch.setattr(unavailable, "find_spec", lambda name: object())


def said(*flags: str) -> str:
    """What is said of flags, in no words where they are taken."""
    argv = tiny_gpt(Path("corpus"), *flags)
    try:
        unavailable.require_available(parsed.require_flags(argv), argv)
    except ValueError as refusal:
        return str(refusal)
    return ""


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_here_is_said_of_its_flag(case: str) -> None:
    flags, message, instead = CASES[case]
    assert said(*flags).startswith(f"{flags[0]}: {message}")
    assert "; " in said(*flags)
    assert instead is None or not said(*instead)


@pytest.mark.parametrize("flag", PACKAGES)
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    of_flag = {"--logits-load-dir": ("x",), "--sft": ("--tokenizer-type", "SFTTokenizer")}
    value = of_flag.get(flag, ())
    for missing in PACKAGES[flag]:
        monkeypatch.setattr(
            unavailable,
            "find_spec",
            lambda name, missing=missing: None if name == missing else find_spec("pytest"),
        )
        assert said(flag, *value).startswith(f"{flag}: needs the package")
        assert f"pip install {missing.replace('_', '-')}" in said(flag, *value)


def test_every_row_has_a_case() -> None:
    asked = {flags[0] for flags, _, _ in CASES.values()} | set(PACKAGES)
    assert all(asked & set(row.flags) for row in unavailable.UNAVAILABLE)

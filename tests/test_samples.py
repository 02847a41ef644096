"""Text while training: in the log, beside the metrics, and which flags are refused."""

from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt, samples
from tests.distributed import pretrain_launched, tiny_gpt

LAYOUT = ("--helix-m", "2", "--helix-n", "1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("def f(\nimport os\\n\nx = 1\n")
    return file


def asking(file: Path, *more: str) -> tuple[str, ...]:
    wanted = ("--helix-sample-interval", "2", "--helix-sample-prompts", str(file))
    return (*wanted, "--helix-sample-tokens", "5", *more)


def test_text_is_printed_and_kept(corpus_prefix: Path, prompts: Path, tmp_path: Path) -> None:
    """Also of three prompts where training splits batches of two."""
    layout = (*LAYOUT, "--helix-split", "batch")
    argv = tiny_gpt(corpus_prefix, *layout, *asking(prompts), train_iters=5)
    pretrain_launched(argv, 2, tmp_path)
    said = samples.read(tmp_path / "metrics")
    assert [(one["step"], one["prompt"]) for one in said] == [
        (step, prompt) for step in (2, 4) for prompt in ("def f(", "import os\n", "x = 1")
    ]
    assert all(0 < len(one["text"]) <= 5 for one in said)
    log = (tmp_path / "logs" / "rank00.log").read_text()
    for one in said:
        line = f"sample after step {one['step']}: {one['prompt']!r} -> {one['text']!r}"
        assert line in log.splitlines()
    assert "sample after" not in (tmp_path / "logs" / "rank01.log").read_text()


def test_what_a_restart_says_again_counts(tmp_path: Path) -> None:
    lines = [(2, "lost"), (4, "lost"), (2, "kept")]
    (tmp_path / samples.FILE).write_text(
        "".join(f'{{"step": {step}, "prompt": "x", "text": "{text}"}}\n' for step, text in lines)
        + '{"step": 6, "pro'
    )
    assert [one["text"] for one in samples.read(tmp_path)] == ["kept", "lost"]
    assert samples.read(tmp_path / "nowhere") == []


BAD = {
    "no file": (("--helix-sample-interval", "2"), None, "goes with --helix-sample-prompts"),
    "no interval": ((), "x", "--helix-sample-prompts: goes with --helix-sample-interval"),
    "interval": (("--helix-sample-interval", "0"), "x", "must be 1 step or more, got 0"),
    "empty": (
        ("--helix-sample-interval", "2"),
        "",
        "must have a prompt on every line, and .* has none;",
    ),
    "a line": (("--helix-sample-interval", "2"), "x\n\ny", "has none on line 2"),
    "long": (
        ("--helix-sample-interval", "2"),
        "x\n" + "y" * 28,
        r"must fit the model's 32 positions .* line 2 .* has 28 tokens; .* ask for 4 tokens",
    ),
    "tokens": (
        ("--helix-sample-interval", "2", "--helix-sample-tokens", "0"),
        "x",
        "--helix-sample-tokens: must be 1 or more, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_refused_before_there_are_ranks(
    corpus_prefix: Path, tmp_path: Path, case: str
) -> None:
    flags, text, message = BAD[case]
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
        flags = (*flags, "--helix-sample-prompts", str(tmp_path / "prompts.txt"))
    flags = ("--helix-sample-tokens", "5", *flags)
    with pytest.raises(ValueError, match=message):
        pretrain_gpt.prepare(tiny_gpt(corpus_prefix, *LAYOUT, *flags), 2)


def test_a_file_that_is_not_there_is_refused(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = tiny_gpt(corpus_prefix, *LAYOUT, *asking(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--helix-sample-prompts: .*nowhere must be a text file"):
        pretrain_gpt.prepare(flags, 2)

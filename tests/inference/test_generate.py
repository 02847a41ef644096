"""``helix generate``: one checkpoint, the same text under every layout, and clear refusals."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_helix import cli, generate
from megatron_helix.commands.generate import Printer
from megatron_helix.inference import measure, saved_model, unserved
from megatron_helix.inference.requests import ByteTokenizer, Request, read_prompts
from megatron_helix.inference.sampling import Sampling
from tests.distributed import launch_ranks, pretrain, tiny_gpt

PROMPTS = ("import os\n", "def f(x):", "class")
GREEDY = Sampling()
Generate = Callable[..., dict[int, list[int]]]


@pytest.fixture(scope="module")
def checkpoint(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with flags of many kinds, saved by a helix layout."""
    folder = tmp_path_factory.mktemp("trained")
    flags = tiny_gpt(
        corpus_prefix,
        *("--helix-m", "2", "--helix-n", "1", "--swiglu", "--disable-bias-linear"),
        *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm"),
        *("--normalization", "RMSNorm", "--rotary-percent", "0.5"),
        *("--untie-embeddings-and-output-weights", "--lr", "1e-2"),
        *("--save", str(folder / "checkpoint"), "--save-interval", "10", "--no-save-optim"),
        train_iters=10,
    )
    pretrain(flags, 2)
    return folder / "checkpoint"


@pytest.fixture
def generated(checkpoint: Path, tmp_path: Path) -> Generate:
    """New tokens of each sequence, as rank 0 emits them."""

    def run(world_size: int, *flags: str, sampling: Sampling = GREEDY, **more: Any) -> dict:
        request = Request(prompts=PROMPTS, new_tokens=8, **more)
        job = generate.prepare(checkpoint, request, flags, world_size)
        file = tmp_path / f"emitted{len(list(tmp_path.iterdir()))}"

        def emit(sequence: int, token: int) -> None:
            with file.open("a") as lines:
                lines.write(f"{sequence} {token}\n")

        launch_ranks(generate.serve, (job, sampling, emit), world_size, tmp_path / "logs")
        tokens: dict[int, list[int]] = {}
        for line in file.read_text().splitlines():
            sequence, token = map(int, line.split())
            tokens.setdefault(sequence, []).append(token)
        return tokens

    return run


def test_every_layout_says_what_one_stock_rank_says(generated: Generate) -> None:
    expected = generated(1)
    assert {len(tokens) for tokens in expected.values()} == {8}
    assert set(expected) == {0, 1, 2}
    # Without sequence parallelism: the next test.
    helix = ("--helix-m", "2", "--helix-n", "2", "--sequence-parallel")
    assert generated(4, *helix) == expected
    pipeline = ("--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2")
    assert generated(4, *pipeline, microbatches=3) == expected


def test_torchruns_ranks_print_the_same_text(
    checkpoint: Path, generated: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command on ranks that something else has started, where only rank 0 has the terminal."""
    layout = ("--helix-device", "cpu", "--helix-m", "2", "--helix-n", "1")
    words = ["generate", "--load", str(checkpoint), "--tokens", "8"]
    words += [word for prompt in PROMPTS for word in ("--prompt", prompt)]

    def rank() -> None:
        monkeypatch.setenv("LOCAL_RANK", os.environ["RANK"])
        result = CliRunner().invoke(cli.app, [*words, "--", *layout])
        if result.exception:
            raise result.exception
        (tmp_path / f"said{os.environ['RANK']}").write_bytes(result.stdout_bytes)

    launch_ranks(rank, (), 2, tmp_path / "logs")
    texts = [bytes(tokens).decode(errors="replace") for tokens in generated(1).values()]
    pairs = [prompt + text + "\n" for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert (tmp_path / "said0").read_text() == "\n".join(pairs)
    assert (tmp_path / "said1").read_text() == ""


def test_drawn_tokens_are_the_seeds(generated: Generate) -> None:
    layout = ("--helix-m", "2", "--helix-n", "1")
    drawn = [generated(2, *layout, sampling=Sampling(temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_a_measurement_holds(checkpoint: Path, tmp_path: Path) -> None:
    request = Request(prompts=("def f(", "class "), new_tokens=8)
    folder = tmp_path / "measured"
    caches = {}
    for name, flags in {
        "helix": ("--helix-m", "4", "--helix-n", "1"),
        "stock": ("--tensor-model-parallel-size", "4"),
    }.items():
        job = generate.prepare(checkpoint, request, flags, 4)
        launch_ranks(generate.measure, (job, GREEDY, folder / name), 4, tmp_path / "logs")
        measured = measure.read(folder / name)
        caches[name] = measured.kv_bytes
        assert (measured.batch, measured.decode_steps) == (2, 7)
        assert measured.itl_p50_ms > 0
        assert measured.itl_p99_ms is None  # of seven times there is none
        assert min(measured.ttft_ms, measured.itl_ms, measured.tpot_ms) > 0
        assert measured.tokens_per_s > 0
        assert measured.sent_bytes["TENSOR_MODEL_PARALLEL_GROUP/all_reduce"] > 0
    assert len(caches["helix"]) == 4
    assert [2 * size for size in caches["helix"]] == caches["stock"]  # two groups on four ranks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: needs at least one"),
        (["--prompt", ""], "--prompt: must not be empty, and number 1 of 1 is"),
        (["--prompt", "x", "--tokens", "0"], "--tokens: must be 1 or more, got 0"),
        (["--prompt", "xx", "--tokens", "31"], r"must fit the model's 32 positions .* got 2"),
        (["--prompt", "x", "--prompt", "y", "--max-batch", "1"], r"at most --max-batch \(1\)"),
        (["--prompt", "x", "--microbatches", "2"], r"number of prompts \(1\), got 2"),
        (["--prompt", "x", "--top-k", "3"], "--temperature: must be above 0"),
        (["--prompt", "x", "--temperature", "-1"], r"--temperature: must be 0 \(greedy\) or more"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "2"], "--top-p: must be between"),
        (
            ["--prompt", "x", "--temperature", "1", "--top-p", "0.5", "--top-k", "2"],
            "--top-p: goes without --top-k",
        ),
        (["--prompt", "x", "--prompts", "/nowhere"], "--prompts: /nowhere must be a text file"),
        (["--prompt", "x", "--load", "/nowhere"], "/nowhere/latest_checkpointed_iteration.txt"),
        (
            ["--prompt", "x", "--", "--helix-m", "2", "--helix-n", "2", "--helix-split", "batch"],
            r"--helix-split: batch needs a multiple of --helix-m \(2\) sequences, got 1",
        ),
        (
            ["--prompt", "x", "--", "--helix-m", "4", "--helix-n", "2"],
            "the number of ranks",
        ),
        (
            ["--prompt", "x", "--", "--helix-m", "1", "--helix-n", "4"],
            r"--helix-n: must be a positive divisor of --num-query-groups \(2\), got 4",
        ),
        (
            ["--prompt", "x", "--", "--no-such-flag"],
            "--no-such-flag: must be a flag of Megatron's or helix's, and is none",
        ),
        (
            ["--prompt", "x", "--", "--pipeline-model-parallel-size", "4"],
            "--pipeline-model-parallel-size: must divide the model's 2 layers, got 4",
        ),
        (
            ["--prompt", "12 300", "--", "--vocab-size", "299"],
            "takes token ids below 299, one space between them, and number 1 is '12 300'",
        ),
        (["--prompt", "x", "--", "--vocab-size", "299"], "takes token ids below 299"),
        (
            [
                "--prompt",
                "x",
                "--",
                *("--helix-m", "2", "--helix-n", "2"),
                "--helix-exchange=weights",
            ],
            "--helix-exchange: weights needs --sequence-parallel",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    checkpoint: Path, words: list[str], message: str
) -> None:
    ranks = ("--nproc-per-node", "4", "--tokens", "4")
    arguments = ["generate", "--load", str(checkpoint), *ranks, *words]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ValueError), result.output
    with pytest.raises(ValueError, match=message):
        raise result.exception


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match="needs a checkpoint in the torch_dist format"):
        generate.prepare(tmp_path, Request(prompts=("x",), new_tokens=1), [], 1)


REFUSED = {
    "fp8": "hybrid",
    "fp4": "e2m1",
    "te_precision_config_file": "layers.yaml",
    "kitchen_config_file": "layers.yaml",
    "kitchen_recipe_number": 1,
    "hybrid_layer_pattern": "M*",
    "heterogeneous_layers_config_path": "layers.json",
    "experimental_attention_variant": "dsa",
    "multi_latent_attention": True,
    "yaml_cfg": "model.yaml",
    "position_embedding_type": "mrope",
    "tokenizer_type": "NullMultimodalTokenizer",
    "window_size": (6, 1),
    "moe_router_force_load_balancing": True,
    "moe_router_force_biased": 0.0,
    "moe_mlp_glu_interleave_size": 8,
    "moe_shared_expert_glu_interleave_size": 8,
    "moe_expert_capacity_factor": 1.5,
    "layernorm_zero_centered_gamma": True,
    "moe_latent_size": 32,
}


@pytest.fixture
def saved(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The checkpoint's arguments, as what is changed in them is read again."""
    args = saved_model.saved_arguments(checkpoint)
    monkeypatch.setattr(saved_model, "saved_arguments", lambda folder: args)
    return args


def _prepared(checkpoint: Path, *flags: str) -> generate.Job:
    return generate.prepare(checkpoint, Request(prompts=("x",), new_tokens=1), flags, 1)


@pytest.mark.parametrize(
    "row",
    [*unserved.MODELS, *unserved.QUANTIZED, *unserved.ON_A_CPU],
    ids=lambda row: row.flag.strip("-"),
)
def test_a_model_that_cannot_be_served_is_refused_by_name(
    checkpoint: Path, saved: argparse.Namespace, row: unserved.Unserved
) -> None:
    value = REFUSED[row.name]
    setattr(saved, row.name, value)
    said = f"{row.flag}: cannot generate, the model was trained with {value}: {row.reason}"
    with pytest.raises(ValueError, match=re.escape(said)):
        _prepared(checkpoint)


def test_a_norm_that_local_layers_pass_over_is_served_as_it_was_trained(
    checkpoint: Path, saved: argparse.Namespace
) -> None:
    saved.qk_l2_norm = True
    assert saved.transformer_impl == "local"
    assert _prepared(checkpoint).vocabulary == 256
    saved.transformer_impl = "transformer_engine"
    message = "--qk-l2-norm: must be served by the layers that it was trained with"
    with pytest.raises(ValueError, match=message):
        _prepared(checkpoint)


def test_what_a_model_was_trained_with_may_be_left_behind(
    checkpoint: Path, saved: argparse.Namespace
) -> None:
    """Where the user says what to serve it with instead."""
    saved.fp8, saved.num_experts, saved.moe_expert_capacity_factor = "hybrid", 4, 1.5
    job = _prepared(checkpoint, "--bf16", "--moe-expert-capacity-factor", "-1")
    args = saved_model.parsed(job.flags, job.saved)
    assert args.bf16
    assert args.fp8 is None
    assert args.moe_expert_capacity_factor == -1


@pytest.mark.parametrize("row", unserved.LAYOUTS, ids=lambda row: row.flag.strip("-"))
def test_a_layout_that_cannot_serve_is_refused(checkpoint: Path, row: unserved.Unserved) -> None:
    said = f"{row.flag}: cannot generate, the layout has 2: {row.reason}; leave it away"
    with pytest.raises(ValueError, match=re.escape(said)):
        _prepared(checkpoint, row.flag, "2")


def test_what_is_refused_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generating.md").read_text()
    rows = [*unserved.MODELS, *unserved.QUANTIZED, *unserved.ON_A_CPU, *unserved.LAYOUTS]
    assert [row.flag for row in rows if f"`{row.flag}" not in page] == []


def test_an_uneven_pipeline_that_is_given_is_not_refused(
    checkpoint: Path, saved: argparse.Namespace
) -> None:
    saved.num_layers = 3
    flags = ("--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "1")
    job = generate.prepare(checkpoint, Request(prompts=("x",), new_tokens=1), flags, 2)
    assert saved_model.parsed(job.flags, saved).decoder_last_pipeline_num_layers == 1


def test_flags_that_are_given_win(checkpoint: Path) -> None:
    job = _prepared(checkpoint, "--bf16", "--max-position-embeddings", "64")
    args = saved_model.parsed(job.flags, job.saved)
    assert args.bf16
    assert args.max_position_embeddings == 64
    assert (args.qk_layernorm, args.normalization) == (True, "RMSNorm")  # the model's


def test_no_token_is_drawn_that_the_tokenizer_does_not_know(
    checkpoint: Path, generated: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary is padded to a multiple of the tensor-parallel size."""

    class Ascii(ByteTokenizer):
        @property
        def vocab_size(self) -> int:
            return 128

    monkeypatch.setattr(generate, "tokenizer_of", lambda args: Ascii())
    hot = Sampling(temperature=50.0)  # any of the 256
    tokens = generated(2, "--helix-m", "2", "--helix-n", "1", sampling=hot)
    drawn = [token for row in tokens.values() for token in row]
    assert len(drawn) == 24
    assert max(drawn) < 128


def test_the_end_of_a_document_is_that_of_training(
    checkpoint: Path, saved: argparse.Namespace
) -> None:
    assert _prepared(checkpoint).tokenizer.eod == 0
    saved.null_tokenizer_eod_id = None
    assert _prepared(checkpoint).tokenizer.eod == 255  # Megatron's default: the last


def test_prompts_of_a_file_come_after_the_others(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("import os\\n\ndef f(\n")
    assert read_prompts(["x"], file) == ("x", "import os\n", "def f(")


def test_text_is_printed_as_it_comes_and_no_character_in_halves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer(("# ", "say "), ByteTokenizer(), sys.stdout)
    euro = list("€".encode())
    printer.add(0, euro[0])
    printer.add(0, euro[1])
    printer.add(1, ord("b"))
    assert capsys.readouterr().out == "# "
    printer.add(0, euro[2])
    assert capsys.readouterr().out == "€"
    printer.finish()
    assert capsys.readouterr().out == "\n\nsay b\n"


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {1}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.55), {1}),
        (Sampling(temperature=1.0), {0, 1, 2}),
    ],
)
def test_only_likely_tokens_are_drawn(sampling: Sampling, possible: set[int]) -> None:
    # Probabilities 0.3, 0.6, 0.1; the fourth is padding of the vocabulary.
    logits = torch.tensor([0.3, 0.6, 0.1, 9.0]).log().expand(200, 4)
    sampler = sampling.sampler(torch.device("cpu"), 3)
    assert set(sampler(logits).tolist()) == possible


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=2), Sampling()]
)
def test_the_log_probabilities_of_drawn_tokens_are_the_samplers(sampling: Sampling) -> None:
    logits = torch.tensor([[0.3, 0.6, 0.1, 9.0]]).log()  # the fourth is padding of the vocabulary
    sampler = sampling.sampler(torch.device("cpu"), 3)
    chances = torch.tensor([0.3, 0.6, 0.1]) ** (1 / (sampling.temperature or 1))
    if sampling.top_k:
        chances[2] = 0
    expected = torch.log(chances / chances.sum())
    for token in range(2):
        found = sampler.log_probs(logits, torch.tensor([token]))
        assert found.item() == pytest.approx(expected[token].item(), rel=1e-5)

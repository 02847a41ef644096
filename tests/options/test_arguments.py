"""The flags: what is refused, with which words, and what is filled in."""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt
from megatron_helix.options import arguments, parsed
from megatron_helix.options.uneven import require_paddable_heads
from megatron_helix.partition.layout import HelixLayout
from tests.distributed import tiny_gpt

TP = "--tensor-model-parallel-size"
FLEX = ("--helix-core-attention", "flex")
GQA = ("--group-query-attention", "--num-query-groups", "2")


def cut(m: object, n: object) -> tuple[str, ...]:
    """The flags of a layout."""
    return ("--helix-m", str(m), "--helix-n", str(n))


RANKS = r"must be a positive divisor of the number of ranks \(4\)"
ODD = ("--seq-length", "42", "--max-position-embeddings", "42")
PACKED = ("--dataloader-inter-document-masking", "--seq-length", "33")
REFUSALS = {
    "more ranks than there are": (
        (*cut(4, 2), "--num-attention-heads", "8"),
        rf"^--helix-m x --helix-n .*: {RANKS}, got 8;",
    ),
    "ranks do not divide": (
        cut(3, 1),
        rf"^--helix-m x --helix-n .*: {RANKS}, got 3;",
    ),
    "pipeline stages do not fit": (
        (*cut(2, 2), "--pipeline-model-parallel-size", "2"),
        rf"\(x pipeline x context parallel size\): {RANKS}, got 8;",
    ),
    "another tensor-parallel size": (
        (*cut(2, 2), TP, "2"),
        rf"^{TP}: must be --helix-m x --helix-n = 2 x 2 = 4, got 2; leave it away$",
    ),
    "another tensor-parallel size, in one word": (
        (*cut(2, 2), f"{TP}=2"),
        rf"^{TP}: must be --helix-m x --helix-n = 2 x 2 = 4, got 2; leave it away$",
    ),
    "no m": (("--helix-n", "2"), r"^--helix-m: must be given, or --tensor-model-parallel-size"),
    "no n": (("--helix-m", "2"), r"^--helix-n: must be given, or --tensor-model-parallel-size"),
    "auto of nothing": (("--helix-n", "auto"), r"^--helix-m: must be given, or --tensor-model"),
    "auto without a model": (
        ("--helix-n", "auto", TP, "4", "--num-attention-heads", "0"),
        r"^--helix-n: auto needs the model's --num-attention-heads",
    ),
    "GTP with a bias of QKV": (
        ("--tensor-parallel-num-weight-shards", "2", "--add-qkv-bias"),
        r"^--tensor-parallel-num-weight-shards: GTP gives a bias of QKV .*got 2 and --add-qkv-bias",
    ),
    "GTP with all biases": (
        ("--tensor-parallel-num-weight-shards", "2"),
        r"^--tensor-parallel-num-weight-shards: GTP .*, got 2 and no --disable-bias-linear; leave",
    ),
    "GTP on a CPU": (
        ("--tensor-parallel-num-weight-shards", "2", "--disable-bias-linear"),
        r"^--tensor-parallel-num-weight-shards: GTP needs TransformerEngine and a GPU, got 2",
    ),
    "context parallelism on a CPU": (
        ("--context-parallel-size", "2"),
        r"^--context-parallel-size: needs TransformerEngine's attention and a GPU, got 2",
    ),
    "m does not divide the tensor-parallel size": (
        ("--helix-m", "3", TP, "4"),
        rf"^--helix-m: must be a positive divisor of {TP} \(4\), got 3",
    ),
    "m of zero": (cut(0, 4), r"^--helix-m: must be a positive integer, got 0$"),
    "negative n": (cut(2, -2), r"^--helix-n: must be a positive integer, got -2$"),
    "sequence split and context parallelism": (
        (*cut(2, 1), "--context-parallel-size", "2", "--helix-split", "sequence"),
        r"^--helix-split: sequence and --context-parallel-size > 1 both cut the sequence",
    ),
    "a loss per sequence and another token order": (
        (
            *(*cut(2, 2), "--sequence-parallel", "--num-experts", "4"),
            *("--helix-exchange", "weights", "--helix-split", "batch"),
            *("--moe-router-load-balancing-type", "seq_aux_loss"),
        ),
        r"^--helix-exchange: weights with --helix-split batch leaves the token order",
    ),
    "n does not divide the heads": (
        (*cut(1, 4), "--num-attention-heads", "6", "--hidden-size", "96"),
        r"^--helix-n: must be a positive divisor of --num-attention-heads \(6\), got 4;",
    ),
    "n does not divide the query groups": (
        (*cut(1, 4), *GQA),
        r"^--helix-n: must be a positive divisor of --num-query-groups \(2\), got 4; use"
        r" --helix-m 2 --helix-n 2 or --helix-m 4 --helix-n 1$",
    ),
    "more segments than rotary pairs": (
        (*cut(4, 1), "--kv-channels", "6"),
        r"^--helix-m: must be from 1 to 3, the rotary pairs of a head of --kv-channels 6, got 4;"
        r" use --helix-m 1 --helix-n 4 or --helix-m 2 --helix-n 2$",
    ),
    "a batch that cannot be split": (
        (*cut(2, 2), "--micro-batch-size", "3", "--helix-split", "batch"),
        r"^--micro-batch-size: must be a multiple of --helix-m \(2\) to split the batch, got 3; use"
        r" --helix-split sequence, or 2 or 4$",
    ),
    "a sequence that cannot be split": (
        (*cut(2, 2), "--seq-length", "30", "--helix-split", "sequence"),
        r"^--seq-length: must be a multiple of --helix-m x --helix-n \(4\) to split the sequence,"
        r" got 30;",
    ),
    "neither batch nor sequence can be split": (
        (*cut(2, 2), "--micro-batch-size", "3", "--seq-length", "30"),
        r"^--seq-length: must be a multiple of .*, got 30; use 28 or 32, or a --micro-batch-size of"
        r" 2 or 4 and the batch split$",
    ),
    "weights without sequence parallelism": (
        (*cut(2, 2), "--helix-exchange", "weights"),
        r"^--helix-exchange: weights .* needs --sequence-parallel, which is not set;",
    ),
    "scores of half a rotary pair": (
        (*cut(2, 2), "--helix-exchange", "scores", "--rotary-percent", "0.75"),
        r"^--helix-exchange: scores needs both channels of a rotary pair in one segment, got"
        r" --kv-channels 16, 12 of them rotary, --helix-m 2;",
    ),
    "a word for a number": (
        cut("two", 2),
        r"^--helix-m: invalid int value: 'two'; correct that flag$",
    ),
    "unknown exchange": (
        (*cut(2, 2), "--helix-exchange", "tokens"),
        r"^--helix-exchange: must be one of auto, activations, weights, scores, got 'tokens'$",
    ),
    "unknown exchange, with one segment": (
        (*cut(1, 4), "--helix-exchange", "tokens"),
        r"^--helix-exchange: must be one of auto, activations, weights, scores, got 'tokens'$",
    ),
    "unknown split": (
        (*cut(2, 2), "--helix-split", "heads"),
        r"^--helix-split: must be one of auto, batch, sequence, got 'heads'$",
    ),
    "no layer gathered once": (
        (*cut(2, 2), "--helix-gather", "once", "--helix-gather-layers", "0"),
        r"^--helix-gather-layers: must be a positive integer, got 0; leave it away .* all layers$",
    ),
    "layers gathered anew": (
        (*cut(2, 2), "--helix-gather-layers", "2"),
        r"^--helix-gather-layers: is of --helix-gather once or step, got 2 and microbatch, .*;",
    ),
    "unknown gathering": (
        (*cut(2, 2), "--helix-gather", "never"),
        r"^--helix-gather: must be one of microbatch, once, step, got 'never'$",
    ),
    "unknown core attention": (
        ("--helix-core-attention", "flash"),
        r"^--helix-core-attention: must be one of spec, prefix, flex, .*, got 'flash'$",
    ),
    "FlexAttention with dropout": (
        (*FLEX, "--attention-dropout", "0.1"),
        r"^--helix-core-attention: flex needs --attention-dropout 0, .*, got 0\.1; set it to 0$",
    ),
    "FlexAttention of partial scores": (
        (*cut(2, 2), *FLEX, "--helix-exchange", "scores"),
        r"^--helix-core-attention: flex never has the scores that --helix-exchange scores moves",
    ),
    "FlexAttention and context parallelism": (
        (*cut(2, 1), *FLEX, "--context-parallel-size", "2"),
        r"^--helix-core-attention: flex attends within one rank and needs .* 1, got 2; leave one",
    ),
    "FlexAttention and latent attention": (
        (*FLEX, "--multi-latent-attention"),
        r"^--helix-core-attention: flex takes the place of Megatron's SelfAttention's, and",
    ),
    "FlexAttention on a CPU": (
        (*cut(2, 2), *FLEX),
        r"^--helix-core-attention: flex needs a GPU, .*, got --helix-device cpu; leave one of",
    ),
    "unknown device": (
        ("--helix-device", "tpu"),
        r"^--helix-device: must be one of auto, cpu, cuda, got 'tpu'$",
    ),
    "no GPU": (
        ("--helix-device", "auto"),
        r"^--helix-device: needs a GPU that torch can see, and found none; add --helix-device cpu",
    ),
    "no GPU for cuda": (("--helix-device", "cuda"), r"^--helix-device: needs a GPU"),
    "a validation micro-batch that no split can take": (
        (*cut(2, 2), *ODD, "--eval-micro-batch-size", "1"),
        r"^--eval-micro-batch-size: validation reads micro-batches of 1, which no rank can take a"
        r" part of: .*; use a multiple of --helix-m \(2\)$",
    ),
    "validation of packed rows that no rank can take": (
        (*cut(2, 2), *PACKED, "--eval-micro-batch-size", "2"),
        r"^--eval-micro-batch-size: validation reads micro-batches of 2, .* packed rows must be a"
        r" multiple of .*, got 66 in a micro-batch; use a multiple of 4$",
    ),
    "validation sequence by sequence that no split can take": (
        (*cut(2, 2), *ODD, "--full-validation"),
        r"^--full-validation: validation reads micro-batches of 1, .*; leave it away, or use",
    ),
}
NO_DATA = {
    "missing": (
        ("--data-path", "no/such/data"),
        r"^--data-path: no/such/data must be the prefix of a Megatron dataset, and"
        r" no/such/data\.bin does not exist; make one with `helix data FILES --out no/such/data`$",
    ),
    "missing in a blend": (
        ("--data-path", "0.5", "no/such/data", "0.5", "no/other"),
        r"^--data-path: no/such/data must be",
    ),
    "of conversations": (
        ("--data-path", "no/such/file", "--sft", "--tokenizer-type", "SFTTokenizer"),
        r"^--data-path: no/such/file must be a file of conversations under --sft, one a line as",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_flags_that_cannot_run_are_refused(corpus_prefix: Path, case: str) -> None:
    flags, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        arguments.complete(tiny_gpt(corpus_prefix, *flags), world_size=4)


def test_degrees_are_named_where_no_cut_of_so_many_ranks_is_there(corpus_prefix: Path) -> None:
    model = ("--num-attention-heads", "40", "--kv-channels", "16")
    flags = tiny_gpt(corpus_prefix, *model, "--helix-n", "auto", TP, "11")
    message = (
        r"^--helix-m: must be from 1 to 8, the rotary pairs of a head of --kv-channels 16, got 11;"
        r" no m x n = 11 cuts this model; degrees that do: 10 \(1 x 10\) and 12 \(3 x 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        arguments.complete(flags, world_size=11)


def test_auto_takes_the_cut_that_sends_least(corpus_prefix: Path) -> None:
    """With few tokens that of fewest segments; weights move where there are many."""
    model = ("--num-attention-heads", "12", "--kv-channels", "16", "--sequence-parallel")
    for length, expected in ((16, ["2", "4"]), (4096, ["4", "2"])):
        size = ("--seq-length", str(length), "--max-position-embeddings", str(length))
        flags = tiny_gpt(corpus_prefix, *model, *size, "--helix-n", "auto", TP, "8")
        argv = arguments.complete(flags, world_size=8)
        assert argv[argv.index("--helix-m") + 1 :][:3:2] == expected


def test_what_is_at_odds_with_padding_is_refused() -> None:
    cuts = [
        HelixLayout(m=m, n=1, num_attention_heads=4, num_query_groups=4, kv_channels=16)
        for m in (3, 4)
    ]
    for name, value in (("log_num_zeros_in_grad", True), ("adam_eps", 0.0)):
        args = argparse.Namespace(**{name: value})
        require_paddable_heads(args, cuts[1])
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"^{flag}: is refused where --helix-m 3 pads"):
            require_paddable_heads(args, cuts[0])


@pytest.mark.parametrize("case", NO_DATA)
def test_data_that_is_not_there_is_refused(corpus_prefix: Path, case: str) -> None:
    flags, message = NO_DATA[case]
    with pytest.raises(ValueError, match=message):
        arguments.require_data(tiny_gpt(corpus_prefix, *flags))


def test_a_flag_that_nobody_knows_is_refused(corpus_prefix: Path) -> None:
    flags = tiny_gpt(corpus_prefix, "--no-such-flag", "4")
    with pytest.raises(ValueError, match=r"^--no-such-flag: must be a flag of Megatron's or"):
        parsed.require_known(flags)
    parsed.require_known(tiny_gpt(corpus_prefix))


def test_a_dataset_without_its_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half.bin").touch()
    with pytest.raises(ValueError, match=r"half\.idx does not exist"):
        arguments.require_data(tiny_gpt(tmp_path / "half"))


def test_the_device_is_checked_without_the_other_flags() -> None:
    assert arguments.device(["--helix-device", "cpu", "--anything", "else"]) == "cpu"
    with pytest.raises(ValueError, match=r"^--helix-device: must be one of"):
        arguments.device(["--helix-device", "tpu"])


@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 1), (1, 4)])
def test_the_tensor_parallel_size_follows_from_the_layout(
    corpus_prefix: Path, m: int, n: int
) -> None:
    flags = tiny_gpt(corpus_prefix, *cut(m, n))
    completed = arguments.complete(flags, world_size=4)
    assert completed[: len(flags)] == flags
    assert completed[completed.index(TP) + 1] == "4"


def test_a_tensor_parallel_size_that_agrees_is_accepted(corpus_prefix: Path) -> None:
    completed = arguments.complete(tiny_gpt(corpus_prefix, *cut(2, 2), TP, "4"), world_size=8)
    sizes = [after for flag, after in itertools.pairwise(completed) if flag == TP]
    assert set(sizes) == {"4"}


def test_without_helix_flags_the_run_is_stock(corpus_prefix: Path) -> None:
    completed = arguments.complete(tiny_gpt(corpus_prefix), world_size=4)
    assert TP not in completed


ASKING = {
    "--helix-exchange": "activations",
    "--helix-split": "sequence",
    "--helix-gather": "microbatch",
}


@pytest.mark.parametrize("flag", ASKING)
def test_a_flag_of_the_partition_asks_for_one(corpus_prefix: Path, flag: str) -> None:
    """Never ignored: with the tensor-parallel size alone, as few segments as the heads allow."""
    for words in ([flag, ASKING[flag]], [f"{flag}={ASKING[flag]}"]):
        asked = tiny_gpt(corpus_prefix, *GQA, *words)
        completed = arguments.complete([*asked, TP, "4"], world_size=4)
        assert completed[completed.index("--helix-m") :][:4] == [*cut(2, 2)]
        with pytest.raises(ValueError, match=rf"^--helix-m: must be given, or {TP}"):
            arguments.complete(asked, world_size=4)


def test_what_a_cpu_needs_is_filled_in(corpus_prefix: Path) -> None:
    flags = tiny_gpt(corpus_prefix)
    added = arguments.complete(flags, world_size=1)[len(flags) :]
    assert added[added.index("--transformer-impl") + 1] == "local"
    assert added[added.index("--distributed-backend") + 1] == "gloo"
    assert "--use-cpu-initialization" in added


def test_a_logger_that_is_not_there_is_not_asked_for(corpus_prefix: Path) -> None:
    flags = tiny_gpt(corpus_prefix)
    assert arguments.complete(flags, world_size=1).count("--no-one-logger") == 1
    for said in (["--no-one-logger"], ["--one-logger-project", "mine"]):
        added = arguments.complete([*flags, *said], world_size=1)[len(flags) + len(said) :]
        assert "--no-one-logger" not in added


def test_conversations_need_no_mask(corpus_prefix: Path) -> None:
    """Megatron's dataset of them asserts that none is asked for."""
    flags = tiny_gpt(corpus_prefix)
    no_mask = "--no-create-attention-mask-in-dataloader"
    assert no_mask not in arguments.complete(flags, world_size=1)
    assert arguments.complete([*flags, "--sft"], world_size=1).count(no_mask) == 1
    assert arguments.complete([*flags, "--sft", no_mask], world_size=1).count(no_mask) == 1


@pytest.mark.parametrize(
    "said",
    [("--transformer-impl", "inference_optimized"), ("--transformer-impl=inference_optimized",)],
)
def test_what_the_user_said_of_it_is_kept(corpus_prefix: Path, said: tuple[str, ...]) -> None:
    flags = tiny_gpt(corpus_prefix, *said)
    added = arguments.complete(flags, world_size=1)[len(flags) :]
    assert "--transformer-impl" not in added
    assert "--distributed-backend" in added


def test_a_mistake_is_one_line_and_exit_code_2(corpus_prefix: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "megatron_helix.pretrain_gpt", *tiny_gpt(corpus_prefix, *cut(3, 1))],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: --helix-m")
    assert len(found.stderr.splitlines()) == 1


def test_only_the_first_rank_says_what_is_wrong(
    corpus_prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            pretrain_gpt.main(tiny_gpt(corpus_prefix, *cut(3, 1)))
        assert exit_.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == lines

"""The entry point beside Megatron-LM's own: what of its flags it obeys."""

import argparse
import base64
import json
import re
from pathlib import Path

import pytest

from megatron_helix import corpus
from megatron_helix.options import parsed
from megatron_helix.upstream import gpt_data
from tests.distributed import pretrain, pretrain_launched, tiny_gpt

EVALUATED = re.compile(r"validation loss at iteration 2 .*?lm loss value: ([0-9.E+-]+)")


def validation_loss(folder: Path, ranks: int) -> float:
    """What the last rank of a run printed after its second step."""
    said = (folder / "logs" / f"rank{ranks - 1:02d}.log").read_text()
    found = EVALUATED.search(said)
    assert found, said[-2000:]
    return float(found[1])


def test_evaluation_micro_batches_of_their_own(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = (
        *("--eval-iters", "2", "--eval-interval", "2", "--split", "80,20,0"),
        *("--eval-micro-batch-size", "1", "--eval-global-batch-size", "8"),
    )
    layouts = {
        "one rank": (1, ()),
        "stock": (2, ("--tensor-model-parallel-size", "2")),
        "helix": (2, ("--helix-m", "2", "--helix-n", "1")),
    }
    found = {}
    for name, (ranks, layout) in layouts.items():
        argv = tiny_gpt(corpus_prefix, *flags, *layout, train_iters=2)
        pretrain_launched(argv, ranks, tmp_path / name)
        found[name] = validation_loss(tmp_path / name, ranks)
    for name in ("stock", "helix"):
        assert found[name] == pytest.approx(found["one rank"], rel=1e-5)


def test_without_an_interval_training_is_not_evaluated(corpus_prefix: Path) -> None:
    """As Megatron documents it; 0.19 divides by what is not given."""
    flags = tiny_gpt(corpus_prefix, train_iters=2)
    assert flags[flags.index("--eval-interval") + 1] == "1000"
    expected = pretrain(flags, 1)
    at = flags.index("--eval-interval")
    del flags[at : at + 2]
    assert pretrain(flags, 1) == expected


@pytest.fixture
def tokenizer(tmp_path: Path) -> tuple[str, ...]:
    """Flags of a tokenizer of bytes with special tokens, such as those around a middle."""
    own = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    around = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|endoftext|>")
    vocabulary = [
        {
            "rank": byte,
            "token_bytes": base64.b64encode(bytes([byte])).decode(),
            "token_str": chr(byte),
        }
        for byte in range(256)
    ]
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps(vocabulary))
    count = len(own) + len(around)
    return (
        *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(file)),
        *("--tiktoken-pattern", "v2", "--tiktoken-num-special-tokens", str(count)),
        *("--tokenizer-special-tokens", *own, *around, "--vocab-size", str(count + 256)),
    )


def test_middles_are_filled_in_alike(corpus_prefix: Path, tokenizer: tuple[str, ...]) -> None:
    stock, helix = ("--tensor-model-parallel-size", "2"), ("--helix-m", "2", "--helix-n", "1")
    runs = {"text": stock, "seldom": (*stock, "--fim-data", "--fim-rate", "1e-9")}
    often = ("--fim-data", "--fim-rate", "1.0")
    runs |= {"stock": (*stock, *often), "helix": (*helix, *often)}
    losses = {
        name: pretrain(tiny_gpt(corpus_prefix, *tokenizer, *flags, train_iters=2), 2).losses
        for name, flags in runs.items()
    }
    assert losses["seldom"] == losses["text"]
    assert losses["stock"] != pytest.approx(losses["text"], rel=1e-3)
    assert losses["helix"] == pytest.approx(losses["stock"], rel=1e-5)


DATA_FLAGS = {
    "--seed 5": ("random_seed", 5),
    "--split 90,10,0": ("split", "90,10,0"),
    "--reset-position-ids": ("reset_position_ids", True),
    "--reset-attention-mask": ("reset_attention_mask", True),
    "--eod-mask-loss": ("eod_mask_loss", True),
    "--no-create-attention-mask-in-dataloader": ("create_attention_mask", False),
    "--no-mmap-bin-files": ("mmap_bin_files", False),
    "--num-dataset-builder-threads 3": ("num_dataset_builder_threads", 3),
    "--mid-level-dataset-surplus 0.25": ("mid_level_dataset_surplus", 0.25),
    "--data-cache-path cache": ("path_to_cache", "cache"),
    "--full-validation": ("full_validation", True),
    "--multiple-validation-sets": ("multiple_validation_sets", True),
    "--allow-ambiguous-pad-tokens": ("allow_ambiguous_pad_tokens", True),
    "--dataloader-inter-document-masking": ("inter_document_masking", True),
}


@pytest.mark.parametrize("flag", DATA_FLAGS)
def test_a_flag_of_the_data_reaches_the_datasets(flag: str) -> None:
    field, value = DATA_FLAGS[flag]
    plain, asked = (
        gpt_data._config(argparse.Namespace(**vars(args), rank=0, data_parallel_size=1))
        for args in (
            parsed.require_flags(tiny_gpt(Path("corpus"), *words)) for words in ((), flag.split())
        )
    )
    assert getattr(plain, field) != value
    assert getattr(asked, field) == value


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Prefix of a dataset of short documents, whose ends fall into most sequences."""
    texts = tmp_path / "notes"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number:03d}.txt").write_text(f"{number}: " + "lorem ipsum "[number % 7 :] * 2)
    corpus.build([texts], tmp_path / "data", pattern="*.txt")
    return tmp_path / "data"


def test_documents_that_are_packed_train_as_documents_that_are_masked(notes: Path) -> None:
    """Stock, whose rotary positions are relative: those of a document need no beginning."""
    packed = ("--dataloader-inter-document-masking",)
    runs = {"through": (), "masked": ("--reset-attention-mask",), "packed": packed}
    losses = {
        name: pretrain(
            tiny_gpt(notes, "--tensor-model-parallel-size", "2", *flags, train_iters=3),
            2,
        ).losses
        for name, flags in runs.items()
    }
    assert losses["masked"] != pytest.approx(losses["through"], rel=1e-4)
    assert losses["packed"] == pytest.approx(losses["masked"], rel=1e-5)

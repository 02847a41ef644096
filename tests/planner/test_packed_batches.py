"""Batches of packed documents: what the planner counts follows their lengths."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_helix.planner import flops, memory
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.batch import BatchConfig, document_lengths
from megatron_helix.run_config.files import validated
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

MODEL = ModelConfig(
    name="small",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    kv_channels=16,
    ffn_hidden_size=256,
)


def deployed(documents: tuple[int, ...] | None, **layout: object) -> Deployment:
    """Two rows of 256 tokens on four ranks."""
    batch = BatchConfig(sequences=2, sequence_length=256, documents=documents)
    cut = LayoutConfig(name="cut", micro_batch=1, **layout)  # type: ignore[arg-type]
    return Deployment(MODEL, cut, batch, 4, "train", "fp16").check()


HELIX = {"m": 2, "n": 2, "exchange": "weights"}


def test_a_token_attends_to_its_document() -> None:
    batch = BatchConfig(sequences=2, sequence_length=100, documents=(10, 30))
    assert batch.keys == (10 * 10 + 30 * 30) / 40
    assert BatchConfig(sequences=2, sequence_length=100).keys == 100
    assert BatchConfig(sequences=2, sequence_length=100, documents=(1000,)).keys == 100


@pytest.mark.parametrize("layout", [{"tp": 4}, HELIX])
def test_operations_of_attention_are_those_of_the_documents(layout: dict[str, object]) -> None:
    def attention(documents: tuple[int, ...] | None) -> float:
        parts = flops.forward(deployed(documents, **layout), 0, fused_channels=256)
        return next(part.flops for part in parts if part.what == "attention")

    assert attention((256,)) == attention(None)
    assert attention((64,)) == attention(None) / 4
    useful = [flops.useful(deployed(of, **layout)) for of in (None, (64,))]
    causal = 3 * 512 * MODEL.num_layers * 4 * 4 * 16
    assert useful[0] - useful[1] == pytest.approx(causal * (128 - 32))


def test_the_split_is_by_sequence_and_prefixes_are_kept() -> None:
    """Not where fused kernels attend gap by gap."""
    here = deployed((64,), m=2, n=2, exchange="weights")
    assert here.plan.split == "sequence"
    through = deployed(None, m=2, n=2, exchange="weights", split="sequence")
    kept = [memory._kept(one, 0, 256) for one in (here, through)]
    assert kept[0] == kept[1]
    # Keys and values of a head group, in fp16; scores are those of the documents.
    of_row, scores = 2 * 4 * 16 / 2 * 256 * 2, 256 * 4 / 4 * 2
    kept = [memory._kept(one, 0, 8) for one in (here, through)]
    assert kept[0] - kept[1] == MODEL.num_layers * (of_row * 1.25 - scores * (256 - 64))
    with pytest.raises(ValueError, match=r"^documents: are packed for training, got phase prefill"):
        replace(here, phase="prefill").check()


def test_lengths_come_from_a_file_or_a_distribution(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("3\n4 5\n")
    assert document_lengths(str(file)) == (3, 4, 5)
    drawn = document_lengths("lognormal:400:1.5")
    assert len(drawn) == 1000
    assert sorted(drawn)[500] == pytest.approx(400, rel=0.01)
    document = {"sequences": 2, "sequence_length": 8, "documents": "lognormal:400:1.5"}
    assert validated(BatchConfig, document, file).documents == drawn


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such", r"documents: must be a file of lengths or lognormal:.*, got no/such, which"),
        (
            "lognormal:x:1",
            r"documents: must be lengths in tokens, or lognormal:.*, got lognormal:x",
        ),
        ("lognormal:-1:1", r"documents: must be lengths in tokens"),
        ("lognormal:5:-1", r"documents: must be lengths in tokens"),
    ],
)
def test_bad_lengths_are_named(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        document_lengths(given)


def test_bad_files_of_lengths_are_named(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    for text in ("", "3 0", "3 x"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"^documents: must be lengths"):
            document_lengths(str(file))

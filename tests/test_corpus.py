"""A dataset made of text files gives every byte back, and a failed build leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_helix import corpus
from megatron_helix.basics import files

TEXTS = {"b.txt": "two\n", "a.py": "x = 'é ∑'\n", "deep/c.txt": "three"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are text, and files that are not."""
    root = tmp_path / "sources"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "latin1.txt").write_bytes("é".encode("latin-1"))
    (root / "nul.txt").write_bytes(b"text\0text")
    (root / "empty.txt").touch()
    return root


def documents(prefix: Path) -> list[bytes]:
    """What Megatron reads, document by document."""
    dataset = IndexedDataset(str(prefix))
    return [np.asarray(dataset[i], dtype=np.uint8).tobytes() for i in range(len(dataset))]


def test_every_text_file_is_read_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "data"
    summary = corpus.build([folder], prefix)
    expected = [TEXTS[name].encode() + b"\0" for name in ("a.py", "b.txt", "deep/c.txt")]
    assert documents(prefix) == expected
    assert summary.documents == 3
    assert summary.tokens == sum(map(len, expected))
    assert sorted(file.name for file in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_the_files_are_those_of_megatrons_own_builder(folder: Path, tmp_path: Path) -> None:
    corpus.build([folder], tmp_path / "data")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint8)
    for name in ("a.py", "b.txt", "deep/c.txt"):
        ids = [*TEXTS[name].encode(), 0]
        builder.add_document(torch.tensor(ids, dtype=torch.uint8), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (tmp_path / f"data.{suffix}").read_bytes() == theirs


def test_files_come_in_the_order_of_the_sources_and_by_pattern(
    folder: Path, tmp_path: Path
) -> None:
    corpus.build([folder / "b.txt", folder], tmp_path / "data", pattern="*.py")
    expected = [TEXTS[name].encode() + b"\0" for name in ("b.txt", "a.py")]
    assert documents(tmp_path / "data") == expected


def test_a_prefix_may_hold_dots(folder: Path, tmp_path: Path) -> None:
    corpus.build([folder], tmp_path / "data.v1.2")
    assert len(documents(tmp_path / "data.v1.2")) == 3


def test_a_rebuild_replaces_the_dataset(folder: Path, tmp_path: Path) -> None:
    corpus.build([folder], tmp_path / "data")
    corpus.build([folder / "a.py"], tmp_path / "data")
    assert documents(tmp_path / "data") == [TEXTS["a.py"].encode() + b"\0"]


def test_a_source_that_does_not_exist_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sources: must exist, and .*missing does not; check"):
        corpus.build([folder, tmp_path / "missing"], tmp_path / "out" / "data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["latin1.txt", "nul.txt", "empty.txt", "*.rst"])
def test_sources_without_text_are_refused_and_leave_nothing(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(
        ValueError, match=r"^sources: need UTF-8 text, and found none in .*sources;"
    ):
        corpus.build([folder], tmp_path / "out" / "data", pattern=pattern)
    assert not (tmp_path / "out").exists()


def test_a_build_that_is_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = corpus._text

    def interrupted(file: Path) -> str:
        if file.name == "b.txt":
            raise KeyboardInterrupt
        return read(file)

    monkeypatch.setattr(corpus, "_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.build([folder], tmp_path / "data")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("place", range(2))
def test_an_interrupted_rebuild_leaves_no_index_beside_other_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    corpus.build([folder], tmp_path / "data")
    replace, left = files.replace, [None] * place

    def interrupted(unfinished: Path, path: Path) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(unfinished, path)

    monkeypatch.setattr(files, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.build([folder / "a.py"], tmp_path / "data")
    with pytest.raises(ValueError, match=r"and .*data\.bin does not exist; make it with"):
        corpus.require_dataset(tmp_path / "data", "--data")
    monkeypatch.setattr(files, "replace", replace)
    corpus.build([folder / "a.py"], tmp_path / "data")
    assert documents(tmp_path / "data") == [TEXTS["a.py"].encode() + b"\0"]


def test_the_flags_name_a_tokenizer_of_bytes(folder: Path, tmp_path: Path) -> None:
    flags = dict(zip(corpus.TOKENIZER_FLAGS[::2], corpus.TOKENIZER_FLAGS[1::2], strict=True))
    assert int(flags["--vocab-size"]) == corpus.VOCAB_SIZE == 256
    corpus.build([folder], tmp_path / "data")
    ends = {document[-1] for document in documents(tmp_path / "data")}
    assert ends == {int(flags["--null-tokenizer-eod-id"])}

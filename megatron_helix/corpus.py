"""Text files as Megatron's indexed dataset, one token a byte.

The tokenizer is Megatron's ``ByteLevelTokenizer``: token = byte of the UTF-8 text, 256 tokens, 0
(which no text contains) ends a document. Train on it with the flags :data:`TOKENIZER_FLAGS`.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError

VOCAB_SIZE = 256
END = 0  # of a document
_UINT8 = 1  # Megatron's DType.uint8
TOKENIZER_FLAGS = (
    *("--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", str(VOCAB_SIZE)),
    *("--null-tokenizer-eod-id", str(END)),
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a dataset holds."""

    documents: int
    tokens: int


def build(sources: Sequence[Path], prefix: Path, *, pattern: str = "*") -> Summary:
    """Write ``prefix.bin`` and ``prefix.idx`` from text files, in the order of their names.

    Files that are not UTF-8 text are left out.

    Args:
        sources: files, or folders to take all files from.
        prefix: path of the dataset without suffix; its folder is made.
        pattern: which files of a folder.

    Raises:
        UserError: when a source does not exist, or no source holds any text; when there can be no
            such pattern, or no such dataset. Nothing is made then.
    """
    for source in sources:
        if not source.exists():
            raise UserError(f"sources: must exist, and {source} does not; check the path")
    if not prefix.name:
        raise UserError(
            f"--out: must be the prefix of files, got the folder {prefix}; add a name to it"
        )
    files.require_place(prefix, "--out")
    texts = list(_files(sources, pattern))
    if not any(map(_text, texts)):
        raise UserError(
            f"sources: need UTF-8 text, and found none in {', '.join(map(str, sources))};"
            f" name other files, or another --pattern than {pattern!r}"
        )
    files.make_folder(prefix.parent, "--out")
    tokens_file, index_file = dataset_files(prefix)
    unfinished = prefix.with_name(prefix.name + ".part")
    unfinished_index = prefix.with_name(prefix.name + ".idx.part")
    lengths = []
    try:
        with unfinished.open("wb") as out:
            for file in texts:
                text = _text(file)
                if text:
                    lengths.append(out.write(text.encode() + bytes([END])))
        with unfinished_index.open("wb") as out:
            out.write(_index(lengths))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        unfinished_index.unlink(missing_ok=True)
        raise
    # Without its tokens there is no dataset: no index is ever beside those of another.
    tokens_file.unlink(missing_ok=True)
    files.replace(unfinished_index, index_file)
    files.replace(unfinished, tokens_file)
    return Summary(documents=len(lengths), tokens=sum(lengths))


def _index(lengths: Sequence[int]) -> bytes:
    """The index of documents of one sequence each, as Megatron's ``IndexedDatasetBuilder`` has it.

    Not by that one: importing torch and Megatron takes ten times as long as all the rest.

    Args:
        lengths: tokens of every document, its end included.
    """
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, _UINT8, len(lengths), len(lengths) + 1)
    ends = np.cumsum([0, *lengths], dtype="<i8")
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    parts = (np.array(lengths, dtype="<i4"), ends[:-1], documents)
    return header + b"".join(part.tobytes() for part in parts)


def require_dataset(prefix: Path, field: str) -> None:
    """Check that a dataset is there, and of bytes: vocabulary and tokens would not fit else.

    Args:
        prefix: path of the dataset without suffix.
        field: what named it, for the error.

    Raises:
        UserError: when a file of it is missing, or its tokens are not bytes.
    """
    for file in dataset_files(prefix):
        if not file.exists():
            raise UserError(
                f"{field}: must be the prefix of a dataset of text, got {prefix}, and {file} does"
                f" not exist; make it with `helix data FILES --out {prefix}`"
            )
    if not _is_of_bytes(dataset_files(prefix)[1]):
        raise UserError(
            f"{field}: must be a dataset of bytes, of which experiments train, got {prefix}, whose"
            f" tokens are larger; make it with `helix data FILES --out {prefix}`"
        )


def dataset_files(prefix: Path) -> list[Path]:
    """What a dataset consists of."""
    return [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]


def _is_of_bytes(index: Path) -> bool:
    """What the header says, behind 9 bytes of magic and 8 of version."""
    with index.open("rb") as file:
        return file.read(18)[17:] == bytes([_UINT8])


def _files(sources: Sequence[Path], pattern: str) -> Iterator[Path]:
    for source in sources:
        if not source.is_dir():
            yield source
            continue
        try:
            yield from sorted(file for file in source.rglob(pattern) if file.is_file())
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"--pattern: must be a pattern of names in a folder, got {pattern!r} ({error});"
                " write e.g. '*.py'"
            ) from None


def _text(file: Path) -> str:
    """The file's text, or nothing where it is not UTF-8 or holds the end-of-document byte."""
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text

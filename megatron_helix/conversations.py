"""Conversations as a dataset for supervised fine-tuning, packed into rows.

A line of the dataset is a row: ``{"messages": [...]}``, as many conversations as fit, each begun by
a message of the system, which is how Megatron's ``SFTDataset`` tells them apart. Tokens are bytes,
as in :mod:`megatron_helix.corpus`; :mod:`megatron_helix.upstream.conversation_data` reads it.
"""

import ast
import json
import random
import sysconfig
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path

from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
END = "\0"  # of an answer
_RESERVED = ("\0", "\1")  # the end of an answer, and padding


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a dataset holds.

    Attributes:
        conversations: of all rows.
        rows: of ``row_tokens`` each.
        tokens: of the conversations; the rest of the rows is padding.
        answer_tokens: those that the loss is of.
        cut: conversations longer than a row, which end with it.
    """

    conversations: int
    rows: int
    row_tokens: int
    tokens: int
    answer_tokens: int
    cut: int

    def __str__(self) -> str:
        share = self.tokens / (self.rows * self.row_tokens)
        return (
            f"{self.conversations:,} conversations in {self.rows:,} rows of {self.row_tokens:,}"
            f" tokens, {share:.0%} full; {self.answer_tokens:,} of {self.tokens:,} tokens are"
            f" answers; {self.cut:,} conversations are cut"
        )


def marked(conversation: Iterable[Message]) -> Iterator[tuple[str, bool]]:
    """The text of a conversation, piece by piece, and whether a piece is an answer."""
    for message in conversation:
        role, content = message["role"], message["content"]
        if role == "assistant":
            yield "Assistant: ", False
            yield content + END, True
        elif content:
            yield f"{role.capitalize()}: {content}\n", False


def build(sources: Sequence[Path], prefix: Path, *, row_tokens: int) -> Summary:
    """Write ``prefix.jsonl`` from files of JSON lines: ``{"messages": [{"role", "content"}]}``.

    Raises:
        UserError: for a file that does not exist, and for a line that is no conversation; names
            file, line and what was wrong.
    """
    return write(_read(sources), prefix, row_tokens=row_tokens)


def write(conversations: Iterable[list[Message]], prefix: Path, *, row_tokens: int) -> Summary:
    """Write ``prefix.jsonl`` from conversations, best-fit decreasing, rows in a random order.

    Raises:
        UserError: when there is none, for an impossible length of rows, or no such file.
    """
    if row_tokens < 2:
        raise UserError(f"--seq-length: must be 2 tokens or more, got {row_tokens}; use more")
    if not prefix.name:
        raise UserError(f"--out: must be the prefix of a file, got the folder {prefix}; add a name")
    files.require_place(prefix, "--out")
    sized = [(_tokens(one), one) for one in conversations]
    if not sized:
        raise UserError("sources: need conversations, and found none; name other files")
    rows = _packed(sorted(sized, key=lambda one: -one[0]), row_tokens)
    random.Random(0).shuffle(rows)
    lines = (json.dumps({"messages": [m for one in row for m in one]}) + "\n" for row in rows)
    files.make_folder(prefix.parent, "--out")
    (file,) = dataset_files(prefix)
    files.write(file, "".join(lines))
    answers = sum(_tokens(one, answers=True, most=row_tokens) for _, one in sized)
    return Summary(
        conversations=len(sized),
        rows=len(rows),
        row_tokens=row_tokens,
        tokens=sum(min(length, row_tokens) for length, _ in sized),
        answer_tokens=answers,
        cut=sum(length > row_tokens for length, _ in sized),
    )


def dataset_files(prefix: Path) -> list[Path]:
    """What a dataset consists of."""
    return [prefix.with_name(prefix.name + ".jsonl")]


def require_dataset(prefix: Path, field: str) -> None:
    """Check that a dataset is there.

    Args:
        prefix: path of the dataset without suffix.
        field: what named it, for the error.

    Raises:
        UserError: when it is not.
    """
    (file,) = dataset_files(prefix)
    if not file.exists():
        raise UserError(
            f"{field}: must be the prefix of a dataset of conversations, got {prefix}, and {file}"
            f" does not exist; make it with `helix data FILES --sft --out {prefix}`"
        )


def read(prefix: Path) -> Iterator[list[Message]]:
    """The conversations of a dataset."""
    (file,) = dataset_files(prefix)
    for line in file.read_text(encoding="utf-8").splitlines():
        row: list[Message] = json.loads(line)["messages"]
        begins = [at for at, one in enumerate(row) if one["role"] == "system"]
        yield from (row[a:b] for a, b in pairwise([*begins, len(row)]))


def lengths(conversations: Iterable[list[Message]]) -> tuple[int, ...]:
    """How many tokens each of them has."""
    return tuple(map(_tokens, conversations))


def _tokens(conversation: list[Message], *, answers: bool = False, most: float = inf) -> int:
    """Of the first ``most``."""
    seen = counted = 0
    for text, is_answer in marked(conversation):
        length = int(min(len(text.encode()), most - seen))
        seen += length
        counted += length if is_answer or not answers else 0
    return counted


def _packed(sized: list[tuple[int, list[Message]]], row_tokens: int) -> list[list[list[Message]]]:
    """Rows of conversations: each in the fullest row that has room for it."""
    rows: list[list[list[Message]]] = []
    rooms: list[tuple[int, int]] = []  # what is left of a row, and its number
    for length, conversation in sized:
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            rows.append([])
            room, row = row_tokens, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(conversation)
        insort(rooms, (max(room - length, 0), row))
    return rows


def _read(sources: Sequence[Path]) -> Iterator[list[Message]]:
    for source in sources:
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"sources: must be files of JSON lines, and {source} cannot be read ({error});"
                " check the path"
            ) from None
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _conversation(line, f"{source}, line {number}")


def _conversation(line: str, where: str) -> list[Message]:
    """The messages of a line, begun by one of the system."""
    try:
        given = json.loads(line)["messages"]
        found = [{"role": one["role"], "content": one["content"]} for one in given]
        whole = all(isinstance(one["content"], str) for one in found)
    except (ValueError, KeyError, TypeError):
        found, whole = [], False
    if not found or not whole:
        raise UserError(
            f'{where}: must be {{"messages": [{{"role": ..., "content": ...}}, ...]}} as JSON, got'
            f" {line[:60]!r}; correct the line"
        )
    unknown = {one["role"] for one in found} - set(ROLES)
    if unknown:
        raise UserError(
            f"{where}: roles must be {', '.join(ROLES)}, got {', '.join(sorted(unknown))}; correct"
            " the line"
        )
    if not any(one["role"] == "assistant" and one["content"] for one in found):
        raise UserError(
            f"{where}: must have an answer of the assistant, which the loss is of, got none; leave"
            " the line out"
        )
    if any(byte in one["content"] for one in found for byte in _RESERVED):
        raise UserError(
            f"{where}: must not hold the characters 0 and 1, which end answers and pad rows, got"
            " one; take it out"
        )
    if "system" in [one["role"] for one in found[1:]]:
        raise UserError(
            f"{where}: the system's message must be the first, since it begins a conversation, got"
            " one behind others; make it a line of its own"
        )
    begins = found[0]["role"] == "system"
    return found if begins else [{"role": "system", "content": ""}, *found]


def standard_library() -> Iterator[list[Message]]:
    """Questions and answers that every machine has: what Python's standard library says of itself.

    Signatures of functions and methods, answered by the first paragraphs of their docstrings.
    """
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            module = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from _documented(module, file.stem)


def _documented(scope: ast.Module | ast.ClassDef, name: str) -> Iterator[list[Message]]:
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{name}.{node.name}")
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        answer = (ast.get_docstring(node) or "").partition("\n\n")[0]
        if answer and not any(byte in answer for byte in _RESERVED):
            yield [
                {"role": "system", "content": ""},
                {"role": "user", "content": f"{name}.{node.name}({ast.unparse(node.args)})"},
                {"role": "assistant", "content": answer},
            ]

"""Conversations become rows, every one whole and once, and train with the loss on answers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_helix import conversations
from megatron_helix.upstream.conversation_data import ByteConversations, ConversationDataset
from tests.distributed import pretrain, tiny_gpt
from tests.test_parity import assert_same_training


def asked(question: str, answer: str, system: str = "") -> list[dict[str, str]]:
    """One conversation."""
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of conversations of many lengths."""
    file = tmp_path / "questions.jsonl"
    talks = [asked("?" * (1 + i % 7), f"{i}" * (1 + i % 3))[1:] for i in range(60)]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


def rows_of(prefix: Path) -> list[list[dict[str, str]]]:
    """What the dataset's lines hold."""
    (file,) = conversations.dataset_files(prefix)
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_every_conversation_is_in_one_row(lines: Path, tmp_path: Path) -> None:
    summary = conversations.build([lines], tmp_path / "new" / "sft", row_tokens=64)
    found: Counter[str] = Counter()
    for row in rows_of(tmp_path / "new" / "sft"):
        assert row[0]["role"] == "system"
        text = "".join(text for text, _ in conversations.marked(row))
        assert len(text.encode()) <= 64
        found.update(message["content"] for message in row if message["role"] == "assistant")
    assert found == Counter(f"{i}" * (1 + i % 3) for i in range(60))
    assert summary.conversations == 60
    assert summary.rows == len(rows_of(tmp_path / "new" / "sft"))
    assert summary.answer_tokens == sum(len(answer) + 1 for answer in found.elements())
    assert summary.cut == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["sft.jsonl"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(30, 80))
def test_rows_are_full(lengths: list[int], row_tokens: int) -> None:
    sized = [(length, asked("", "x" * length)) for length in sorted(lengths, reverse=True)]
    rows = conversations._packed(sized, row_tokens)
    used = [sum(len(one[2]["content"]) for one in row) for row in rows]
    assert sum(used) == sum(lengths)
    assert all(
        tokens <= row_tokens or len(row) == 1 for tokens, row in zip(used, rows, strict=True)
    )
    # No two rows could be one: else the second had not been begun.
    assert not any(a + b <= row_tokens for i, a in enumerate(used) for b in used[i + 1 :])


def test_a_long_conversation_is_a_row_that_is_cut(tmp_path: Path) -> None:
    summary = conversations.write([asked("?", "x" * 99)] * 2, tmp_path / "sft", row_tokens=32)
    assert (summary.rows, summary.cut, summary.tokens) == (2, 2, 64)
    assert summary.answer_tokens == 2 * (32 - len("User: ?\nAssistant: "))


BAD = {
    "no JSON": ("nonsense", r"line 1: must be \{\"messages\""),
    "no messages": ('{"text": "x"}', r"line 1: must be \{\"messages\""),
    "no text": ('{"messages": [{"role": "user", "content": 3}]}', "line 1: must be"),
    "another role": (
        '{"messages": [{"role": "tool", "content": "x"}]}',
        "line 1: roles must be system, user, assistant, got tool;",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "line 1: must have an answer of the assistant",
    ),
    "an end inside": (
        r'{"messages": [{"role": "assistant", "content": "a\u0000b"}]}',
        "line 1: must not hold the characters 0 and 1",
    ),
    "a late system": (
        '{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": ""}]}',
        "line 1: the system's message must be the first",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(bad: str, tmp_path: Path) -> None:
    line, message = BAD[bad]
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message) as refused:
        conversations.build([file], tmp_path / "sft", row_tokens=64)
    assert str(refused.value).startswith(str(file))
    assert not list(tmp_path.glob("sft*"))


def test_files_rows_and_names_are_checked(tmp_path: Path) -> None:
    talk = [asked("?", "!")]
    with pytest.raises(ValueError, match=r"^sources: must be files of JSON lines, and no/such"):
        conversations.build([Path("no/such")], tmp_path / "sft", row_tokens=64)
    with pytest.raises(ValueError, match=r"^sources: need conversations, and found none"):
        conversations.write([], tmp_path / "sft", row_tokens=64)
    with pytest.raises(ValueError, match=r"^--seq-length: must be 2 tokens or more, got 1"):
        conversations.write(talk, tmp_path / "sft", row_tokens=1)
    with pytest.raises(ValueError, match=r"^data: must be the prefix of a dataset of conv"):
        conversations.require_dataset(tmp_path / "sft", "data")


def test_the_standard_library_answers() -> None:
    talks = {talk[1]["content"]: talk[2]["content"] for talk in conversations.standard_library()}
    assert len(talks) > 1000
    assert talks["bisect.bisect_left(a, x, lo=0, hi=None, *, key=None)"].startswith("Return the")


def samples(prefix: Path, length: int) -> list[dict[str, Any]]:
    """Rows as Megatron's dataset gives them."""
    from types import SimpleNamespace

    (file,) = conversations.dataset_files(prefix)
    config = SimpleNamespace(
        tokenizer=ByteConversations(),
        sequence_length=length,
        context_parallel_size=1,
        reset_position_ids=False,
        create_attention_mask=False,
        reset_attention_mask=False,
    )
    data = ConversationDataset.__new__(ConversationDataset)
    data.dataset = ConversationDataset.build_low_level_dataset(str(file), config)
    data.indices, data.config = range(len(data.dataset)), config
    return [data[i] for i in range(len(data.dataset))]


def test_the_loss_is_of_answers_only(tmp_path: Path) -> None:
    talks = [asked("one", "first"), asked("two", "second", "be brief")]
    conversations.write(talks, tmp_path / "sft", row_tokens=100)
    (row,) = samples(tmp_path / "sft", 100)
    scored = row["labels"][row["loss_mask"].bool()]
    answers = bytes(scored.tolist()).split(b"\0")
    assert sorted(answers) == [b"", b"first", b"second"]
    text = bytes(row["tokens"].tolist())
    assert text.count(b"Assistant: ") == text.count(b"User: ") == 2
    ends = row["cu_seqlens"].unique().tolist()
    assert ends[0] == 0
    assert ends[-1] == 100  # the padding is the last document's
    assert text[ends[1] - 1] == 0
    assert torch.equal(row["position_ids"][ends[1] : ends[1] + 3], torch.arange(3))


def test_rows_of_conversations_train_as_stock(lines: Path, tmp_path: Path) -> None:
    conversations.build([lines], tmp_path / "sft", row_tokens=64)
    (file,) = conversations.dataset_files(tmp_path / "sft")
    flags = (
        *("--sft", "--sequence-parallel", "--seq-length", "64", "--max-position-embeddings", "64"),
        "--no-create-attention-mask-in-dataloader",
    )
    stock, helix = (
        pretrain(tiny_gpt(file, *flags, *layout), 4)
        for layout in (
            ("--tensor-model-parallel-size", "4"),
            ("--helix-m", "2", "--helix-n", "2", "--helix-exchange", "weights"),
        )
    )
    assert_same_training(helix, stock)


def test_a_dataset_is_read_back(lines: Path, tmp_path: Path) -> None:
    summary = conversations.build([lines], tmp_path / "sft", row_tokens=64)
    told = list(conversations.read(tmp_path / "sft"))
    assert len(told) == 60
    assert all(talk[0]["role"] == "system" for talk in told)
    assert sum(conversations.lengths(told)) == summary.tokens

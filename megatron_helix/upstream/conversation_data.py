"""Conversations for ``--sft``: Megatron's dataset of them, and a tokenizer of bytes.

Megatron's ``SFTDataset`` reads lines by the package ``datasets``, and its ``SFTTokenizer`` takes
tokenizers of the package ``transformers``. Neither is needed for JSON lines of bytes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.tokenizers.text.models import DefaultTokenizerText
from megatron.training.datasets.sft_dataset import IGNORE_INDEX, SFTDataset

from megatron_helix.conversations import Message, marked

BYTES = 256


class ConversationDataset(SFTDataset):
    """Megatron's, of a file of JSON lines that is read here."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> "_Lines":
        """The conversations of every line."""
        return _Lines(dataset_path)


class _Lines:
    """The messages of every line of a file."""

    def __init__(self, file: str):
        with Path(file).open(encoding="utf-8") as lines:
            self.rows: list[list[Message]] = [json.loads(line)["messages"] for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Message]:
        return self.rows[index]


class ByteConversations(DefaultTokenizerText):
    """Conversations as the bytes of their text: 0 ends an answer, 1 is padding."""

    def __init__(self) -> None:
        super().__init__("bytes", {"library": "byte-level"}, vocab_size=BYTES)

    def tokenize_conversation(
        self, conversation: list[Message], return_target: bool, add_generation_prompt: bool
    ) -> Any:
        """Tokens ``[t]``, and with ``return_target`` the same with all but answers left out."""
        tokens: list[int] = []
        targets: list[int] = []
        for text, is_answer in marked(conversation):
            ids = self.tokenize(text)
            tokens += ids
            targets += ids if is_answer else [IGNORE_INDEX] * len(ids)
        if add_generation_prompt:
            tokens += self.tokenize("Assistant: ")
            targets += [IGNORE_INDEX] * (len(tokens) - len(targets))
        found = np.array(tokens, dtype=np.int64)
        return (found, np.array(targets, dtype=np.int64)) if return_target else found

"""A generation request: prompts as tokens, and every refusal of one that cannot be served."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_helix.basics.errors import UserError
from megatron_helix.corpus import VOCAB_SIZE


class Tokenizer(Protocol):
    """What generation asks of a tokenizer: Megatron's have it."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows; a model may have more, which pad its vocabulary."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Text -> token ids."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Token ids -> text."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte, as ``helix data`` makes them; what is not UTF-8 becomes U+FFFD.

    Attributes:
        eod: the token that ends a document.
    """

    eod: int = 0

    @property
    def vocab_size(self) -> int:
        """As many tokens as there are bytes."""
        return VOCAB_SIZE

    def tokenize(self, text: str) -> list[int]:
        """Text -> its UTF-8 bytes."""
        return list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        """Bytes -> text."""
        return bytes(ids).decode(errors="replace")


def tokenizer_of(args: argparse.Namespace) -> Any:
    """The tokenizer that the arguments name: Megatron's own, or bytes where it has none."""
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size == VOCAB_SIZE:
        eod = args.null_tokenizer_eod_id
        return ByteTokenizer(VOCAB_SIZE - 1 if eod is None else eod)  # Megatron's default
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    # Beside making a tokenizer it writes the padded vocabulary of a rank into the arguments.
    return build_tokenizer(argparse.Namespace(**{**vars(args), "pad_vocab_size": False}))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        prompts: one or more texts.
        new_tokens: tokens to generate for each.
        max_batch: sequences that are served together at most.
        microbatches: parts of the batch, which keep the stages of a pipeline busy at once.

    Raises:
        UserError: for what no model can serve.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    max_batch: int = 64
    microbatches: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("--prompt: needs at least one; give --prompt TEXT or --prompts FILE")
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt:
                raise UserError(
                    f"--prompt: must not be empty, and number {number} of {len(self.prompts)} is;"
                    " give it at least one character"
                )
        if self.new_tokens < 1:
            raise UserError(f"--tokens: must be 1 or more, got {self.new_tokens}")
        if len(self.prompts) > self.max_batch:
            raise UserError(
                f"--prompt: at most --max-batch ({self.max_batch}) at once, got"
                f" {len(self.prompts)}; give fewer, or raise it if memory allows"
            )
        if self.microbatches < 1 or len(self.prompts) % self.microbatches:
            raise UserError(
                "--microbatches: must be a positive divisor of the number of prompts"
                f" ({len(self.prompts)}), got {self.microbatches}"
            )

    def tokens(self, tokenizer: Tokenizer, limit: int) -> list[list[int]]:
        """The prompts' token ids.

        Args:
            tokenizer: the model's.
            limit: positions that the model was made for.

        Raises:
            UserError: when a prompt and what is to be generated behind it go beyond the limit, and
                for a prompt that is not of the tokenizer's tokens.
        """
        ids = [token_ids(prompt, n, tokenizer) for n, prompt in enumerate(self.prompts, 1)]
        for number, prompt in enumerate(ids, 1):
            # Sequences share their positions: all take as many as the longest prompt.
            if len(prompt) + self.new_tokens > limit:
                raise UserError(
                    f"--tokens: prompt and new tokens must fit the model's {limit} positions"
                    f" (--max-position-embeddings), got {len(prompt)} (prompt {number}) +"
                    f" {self.new_tokens}; shorten the prompt, or ask for"
                    f" {max(0, limit - len(prompt))} tokens at most"
                )
        return ids


def token_ids(
    prompt: str, number: int, tokenizer: Tokenizer, *, field: str = "--prompt"
) -> list[int]:
    """The ids of a prompt, which is the ``number``-th that ``field`` gave.

    Raises:
        UserError: when it is not of the tokenizer's tokens.
    """
    try:
        ids = list(tokenizer.tokenize(prompt))
    except ValueError:
        ids = [-1]
    if not all(0 <= token < tokenizer.vocab_size for token in ids):
        raise UserError(
            f"{field}: a model without a tokenizer takes token ids below"
            f" {tokenizer.vocab_size}, one space between them, and number {number} is {prompt!r};"
            " give such, or the model's tokenizer (--tokenizer-type and its files) behind the --"
        )
    return ids


def read_prompts(
    prompts: Sequence[str], file: Path | None, *, field: str = "--prompts"
) -> tuple[str, ...]:
    r"""The prompts given one by one, then those of ``file``, one a line, ``\n`` for a line break.

    ``field`` is what named the file.

    Raises:
        UserError: when the file cannot be read.
    """
    lines: list[str] = []
    if file:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{field}: {file} must be a text file: {error}") from None
    return (*prompts, *(line.replace("\\n", "\n") for line in lines))

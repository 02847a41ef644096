"""Which tokens of the engine's steps are new ones of which sequence, and which have ended."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class New(NamedTuple):
    """A new token.

    Attributes:
        sequence: that it belongs to, counted over all micro-batches.
        row: of the sequence in its micro-batch.
        token: its id; the one that ends the sequence included.
    """

    sequence: int
    row: int
    token: int


class StepTokens(Protocol):
    """What of a step of the engine is read."""

    @property
    def microbatch(self) -> int:
        """Which one."""
        ...

    @property
    def tokens(self) -> torch.Tensor:
        """``[b]``, on the CPU."""
        ...

    @property
    def position(self) -> int:
        """Of the tokens."""
        ...


class Transcript:
    """Follows the sequences of a batch.

    Args:
        lengths: of the prompts.
        new_tokens: that each sequence gets at most.
        size: sequences of a micro-batch.
        end_token: that ends a sequence; None if none does.
    """

    def __init__(
        self, lengths: Sequence[int], new_tokens: int, *, size: int, end_token: int | None
    ):
        self.starts, self.new_tokens = list(lengths), new_tokens
        self.size, self.end_token = size, end_token
        self.ended = [False] * len(self.starts)

    def add(self, step: StepTokens) -> list[New]:
        """The new tokens of a step: none of a prompt, and none behind a sequence's end."""
        added = []
        for row, token in enumerate(step.tokens.tolist()):
            sequence = step.microbatch * self.size + row
            if step.position < self.starts[sequence] or self.ended[sequence]:
                continue
            added.append(New(sequence, row, token))
            last = step.position + 1 == self.starts[sequence] + self.new_tokens
            self.ended[sequence] = last or token == self.end_token
        return added

    def done(self) -> bool:
        """Whether all sequences have ended."""
        return all(self.ended)

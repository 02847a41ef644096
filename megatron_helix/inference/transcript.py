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
        self.starts, self.new_tokens = torch.tensor(lengths), new_tokens
        self.size, self.end_token = size, end_token
        self.ended = torch.zeros(len(lengths), dtype=torch.bool)

    def fresh(self, step: StepTokens) -> torch.Tensor:
        """Which tokens ``[b]`` of a step are new: none of a prompt, none behind an end."""
        own = slice(step.microbatch * self.size, (step.microbatch + 1) * self.size)
        starts, ended = self.starts[own], self.ended[own]
        fresh = (step.position >= starts) & ~ended
        over = step.position + 1 == starts + self.new_tokens
        if self.end_token is not None:
            over |= step.tokens == self.end_token
        ended |= fresh & over  # a view of all sequences'
        return fresh

    def add(self, step: StepTokens) -> list[New]:
        """The new tokens of a step, one by one."""
        tokens = step.tokens.tolist()
        rows = self.fresh(step).nonzero().flatten().tolist()
        return [New(step.microbatch * self.size + row, row, tokens[row]) for row in rows]

    def done(self) -> bool:
        """Whether all sequences have ended."""
        return bool(self.ended.all())

"""The task: sort four digits. Replace this file by your own; the loop asks no more of it.

A problem is a prompt; what the model writes behind it earns a reward. ``solution`` is asked for the
short supervised start alone, which shows the model the form of an answer.
"""

import random

LONGEST = 10  # bytes of a prompt and an answer, the byte that ends it included
NEW_TOKENS = 5  # of an answer, at most


def problem(dice: random.Random) -> str:
    """A prompt."""
    return "".join(dice.choices("0123456789", k=4)) + ">"


def solution(prompt: str) -> str:
    """A right answer."""
    return "".join(sorted(prompt.rstrip(">")))


def reward(prompt: str, answer: str) -> float:
    """What an answer is worth, any finite number: here the share of digits that stand in place.

    An answer of another length is worth nothing.
    """
    right = solution(prompt)
    if len(answer) != len(right):
        return 0.0
    return sum(one == other for one, other in zip(answer, right, strict=True)) / len(right)

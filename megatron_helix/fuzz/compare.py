"""What two runs of one case must agree on, how nearly, and why just so nearly."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_helix.fuzz.training import Step

# Single precision has a unit roundoff of 6e-8. A sum of k terms in another order is about sqrt(k)
# of them apart, and no case sums more than some thousand: 2e-6. A gradient has passed through every
# layer once more. The norm of the weights is a plain sum of squares, which a wrong update moves
# little: the nearer it is held, the more it sees.
TOLERANCES = {"loss": 2e-6, "grad_norm": 5e-6, "params_norm": 1e-6}

# One weight's gradient, by the norm of what differs: elements err one by one, where a norm's errors
# cancel: twice what stock's own tensor-parallel sizes have been apart. Where the sum itself cancels
# (a bias of keys has no gradient: softmax does not see it), what is left is the roundoff of what
# cancelled: small beside the whole gradient, not beside it; a few roundoffs, of every layer.
WEIGHT_TOLERANCE, CANCELLED_TOLERANCE = 2e-5, 5e-7

# A part of the learning rate, which a first update of Adam is at most: its epsilon (see case.py) is
# so far above a gradient's roundoff that the update does not turn with it.
UPDATE_TOLERANCE = 1e-3
FIRST_MOMENT = "exp_avg."


Run = list[list[Step]]  # of every rank, every step


@dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
        what: the quantity, or the tensor of a checkpoint.
        where: the step or the rank it was seen at.
        expected: stock's value.
        found: helix's.
        error: how far apart they are, relative as the tolerance is.
        allowed: how far they may be.
    """

    what: str
    where: str
    expected: float
    found: float
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.what} of {self.where}: stock {self.expected:.8g}, helix {self.found:.8g},"
            f" {self.error:.1e} apart, {self.allowed:.0e} allowed"
        )


def steps(
    expected: Run, found: Run, *, only: int | None = None
) -> tuple[list[Difference], dict[str, float]]:
    """Compare every rank's steps with the reference's.

    Args:
        expected: the reference's.
        found: the tried run's.
        only: how many steps, from the first; None for all.

    Returns:
        The differences, in the order they came to be, and the largest error of every quantity as
        a part of what is allowed.
    """
    differences: list[Difference] = []
    margins = dict.fromkeys(TOLERANCES, 0.0)
    for step in range(only or len(expected[0])):
        for what, allowed in TOLERANCES.items():
            stock = _told(expected, step, what)
            if stock is None:
                continue
            for rank, of_rank in enumerate(found):
                value = getattr(of_rank[step], what)
                if value is None:
                    continue
                error = abs(value - stock) / (abs(stock) or 1.0)
                if not error <= allowed:  # nor is a NaN
                    where = f"step {step + 1}, rank {rank}"
                    differences.append(Difference(what, where, stock, value, error, allowed))
                margins[what] = max(margins[what], error / allowed)
    return differences, margins


def _told(run: Run, step: int, what: str) -> float | None:
    """A quantity that some ranks know: the last of them tells."""
    values = [getattr(of_rank[step], what) for of_rank in reversed(run)]
    return next((value for value in values if value is not None), None)


def is_finite(run: Run) -> bool:
    """Whether a run gave numbers that say anything."""
    return all(
        value is None or math.isfinite(value)
        for of_rank in run
        for step in of_rank
        for value in (step.loss, step.grad_norm, step.params_norm)
    )


def checkpoints(
    expected: str, found: str, learning_rate: float
) -> tuple[list[Difference], dict[str, float]]:
    """Compare two checkpoints of the first step by name: every weight, and its gradient.

    After one step Adam's first moment is (1 - beta1) times the gradient, and a checkpoint holds it
    in Megatron's order whatever the layout. To be called in a process group.

    Args:
        expected: folder of the reference's checkpoint.
        found: of the tried run's.
        learning_rate: of the step.
    """
    from megatron.core.dist_checkpointing import load_plain_tensors

    one, other = _tensors(load_plain_tensors(expected)), _tensors(load_plain_tensors(found))
    differences = [
        Difference(name, "the checkpoints' names", name in one, name in other, math.inf, 0.0)
        for name in sorted(one.keys() ^ other.keys())
    ]
    margins = {"gradient": 0.0, "weight": 0.0}
    whole = math.sqrt(sum(float(x.norm()) ** 2 for name, x in one.items() if FIRST_MOMENT in name))
    for name in sorted(
        one.keys() & other.keys(), key=lambda name: (FIRST_MOMENT not in name, name)
    ):
        a, b = one[name], other[name]
        norms = float(a.norm()), float(b.norm())
        if a.shape != b.shape:
            shapes = f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            differences.append(Difference(name, shapes, *norms, math.inf, 0.0))
            continue
        if FIRST_MOMENT in name:
            what, error = "gradient", float((a - b).norm())
            allowed = max(WEIGHT_TOLERANCE * norms[0], CANCELLED_TOLERANCE * whole)
        elif "optimizer" not in name:
            what, error = "weight", float((a - b).abs().max())
            allowed = UPDATE_TOLERANCE * learning_rate
        else:
            continue
        if not error <= allowed:
            where = f"{name} after step 1 (norms)"
            differences.append(Difference(what, where, *norms, error, allowed))
        margins[what] = max(margins[what], error / allowed)
    return differences, margins


def _tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}

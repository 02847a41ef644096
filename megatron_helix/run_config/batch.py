"""The tokens of a step."""

import math
from pathlib import Path
from statistics import NormalDist, StatisticsError
from typing import Any

from pydantic import PositiveInt, field_validator

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.files import Config


class BatchConfig(Config):
    """Tokens of one step.

    Attributes:
        sequences: of a step, of all data-parallel ranks together.
        sequence_length: tokens of each.
        documents: lengths of those that are packed into the sequences, as many times over as it
            takes, cut at the sequence's length; in a file also the path of a file of numbers, or
            ``lognormal:MEDIAN:SIGMA``. Without them a sequence is one document.
    """

    sequences: PositiveInt
    sequence_length: PositiveInt
    documents: tuple[PositiveInt, ...] | None = None

    @field_validator("documents", mode="before")
    @classmethod
    def _read_documents(cls, given: Any) -> Any:
        return document_lengths(given) if isinstance(given, str) else given

    @property
    def keys(self) -> float:
        """Tokens of the document that a token is in, ``sum l^2 / sum l``: the mean over tokens."""
        lengths = [min(length, self.sequence_length) for length in self.documents or ()]
        if not lengths:
            return self.sequence_length
        return sum(length**2 for length in lengths) / sum(lengths)

    @property
    def tokens(self) -> int:
        """Tokens of a global batch."""
        return self.sequences * self.sequence_length


def document_lengths(given: str) -> tuple[int, ...]:
    """Lengths of documents, from a file of numbers or from a distribution.

    Args:
        given: the path of a file, or ``lognormal:MEDIAN:SIGMA``, of which 1000 quantiles are
            taken (the logarithm is normal, SIGMA its standard deviation).

    Raises:
        UserError: for a file that cannot be read, and for what are no lengths.
    """
    name, *numbers = given.split(":")
    try:
        if name == "lognormal" and len(numbers) == 2:
            median, sigma = map(float, numbers)
            normal = NormalDist(math.log(median), sigma)
            quantiles = (normal.inv_cdf((i + 0.5) / 1000) for i in range(1000))
            return tuple(max(1, round(math.exp(quantile))) for quantile in quantiles)
        lengths = tuple(map(int, Path(given).read_text().split()))
    except OSError as error:
        raise UserError(
            f"documents: must be a file of lengths or lognormal:MEDIAN:SIGMA, got {given}, which"
            f" cannot be read: {error.strerror}; check the path"
        ) from None
    except (ValueError, StatisticsError, OverflowError) as error:
        raise UserError(
            f"documents: must be lengths in tokens, or lognormal:MEDIAN:SIGMA, got {given}"
            f" ({error}); correct it"
        ) from None
    if not lengths or min(lengths) < 1:
        raise UserError(f"documents: must be lengths of a token or more, got {given}; correct it")
    return lengths

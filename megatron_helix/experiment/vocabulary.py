"""How many rows the embedding has: as many in every layout of an experiment.

Megatron pads a vocabulary to a multiple of ``--make-vocab-size-divisible-by`` times the
tensor-parallel size, and the rows that pad take part in the softmax: layouts of unlike sizes would
have unlike losses. What all of an experiment are padded to is what Megatron makes of it at the
least common multiple of their sizes, and ``--padded-vocab-size`` says so to every run.
"""

import math
from collections.abc import Sequence

from megatron_helix import corpus
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.options.flags import FlagParser
from megatron_helix.planner.sizes import VOCAB_MULTIPLE, padded_rows

FLAG = "--padded-vocab-size"
_OF_TOKENS = {"--tokenizer-type", "--tokenizer-model", "--vocab-size"}


def rows(experiment: ExperimentConfig) -> int:
    """Rows of the embedding of every run that trains or prefills: those of bytes, and padding.

    Raises:
        UserError: when the experiment's ``flags`` give another number, which its layouts cannot
            share.
    """
    sizes = math.lcm(*(layout.tensor_parallel_size for layout in experiment.layouts))
    asked = _asked(experiment)
    if asked is None:
        return padded_rows(corpus.VOCAB_SIZE, sizes)
    if asked < corpus.VOCAB_SIZE or asked % sizes:
        raise UserError(
            f"flags: {FLAG} must be at least {corpus.VOCAB_SIZE}, of bytes, and a multiple of"
            f" {sizes}, for all layouts to share, got {asked}; leave it out, or use"
            f" {padded_rows(corpus.VOCAB_SIZE, sizes)}"
        )
    return asked


def flags(experiment: ExperimentConfig) -> list[str]:
    """What says so to Megatron, where there is something to pad; to who makes the weights, too.

    Decode runs are padded by each layout to its own size.
    """
    said = ["--make-vocab-size-divisible-by", str(VOCAB_MULTIPLE)]
    many = rows(experiment)
    return [*said, FLAG, str(many)] if many > corpus.VOCAB_SIZE else said


def of_bytes(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """Flags of a run without the number of rows, where ``more`` of them name other tokens."""
    if not _OF_TOKENS & {word.partition("=")[0] for word in more}:
        return list(words)
    at = words.index(FLAG) if FLAG in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def _asked(experiment: ExperimentConfig) -> int | None:
    parser = FlagParser()
    parser.add_argument(FLAG, type=int)
    return parser.parse_known_args(experiment.flags)[0].padded_vocab_size

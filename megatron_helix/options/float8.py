"""What of a partition FP8 does not go with.

TransformerEngine's GEMMs in FP8 read rows of whole words of 16 elements
(``assert_dim_for_fp8_exec`` in its ``pytorch/utils.py``, 2.20.2), forward by one axis of a weight
and backward by the other. So the rows and the columns that a rank stores must be such, whatever
is exchanged; and so must the tokens that a weight's gradient is the sum of. A gathered weight that
is cut by columns is shown to TransformerEngine with 1/m of its rows
(:mod:`megatron_helix.exchange.distributed_weight`), which have the same memory only where segments
have no padding.
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice, multiples
from megatron_helix.options.uneven import has_dense_layers
from megatron_helix.partition.features import padded
from megatron_helix.partition.layout import HelixLayout

WORD = 16  # elements


def require_float8(asked: Choice, config: Any, cut: HelixLayout) -> None:
    """Check that weights in FP8 can be cut and exchanged as they are asked for.

    Args:
        asked: how the run exchanges.
        config: a ``TransformerConfig``.
        cut: the partition, with m > 1.

    Raises:
        UserError: naming the flag, the reason and the remedy.
    """
    if not config.fp8:
        return
    layout = f"--helix-m {cut.m} --helix-n {cut.n}"
    otherwise = f"or leave --fp8-format {config.fp8} away"
    if asked.exchange == "scores":
        raise UserError(
            "--helix-exchange: scores has not been run on projections in FP8, got --fp8-format"
            f" {config.fp8}; use activations or weights, {otherwise}"
        )
    if cut.waste:
        raise UserError(
            f"--helix-m: FP8 needs segments without padding, got {cut.m} segments of --kv-channels"
            f" {cut.kv_channels}, stored as {cut.padded_channels}; use a --helix-m that divides,"
            f" {otherwise}"
        )
    parts = 1 if asked.exchange == "activations" else cut.m
    if config.hidden_size % (WORD * parts):
        of, instead = f"{WORD}", ""
        if parts > 1:
            of, instead = f"{WORD} x --helix-m ({WORD * parts})", "--helix-exchange activations, "
        raise UserError(
            f"--hidden-size: must be a multiple of {of} for FP8, got {config.hidden_size}; use"
            f" another, {instead}{otherwise}"
        )
    for flag, what, count in _of_a_rank(config, cut):
        if count % WORD:
            raise UserError(
                f"{flag}: a rank must have a multiple of {WORD} {what} for FP8, got {count} under"
                f" {layout}; use another layout or size, {otherwise}"
            )


def require_float8_tokens(asked: Choice, config: Any, cut: HelixLayout, tokens: int) -> None:
    """Check that the tokens a rank multiplies are whole words in FP8.

    Of ``tokens`` of a micro-batch all under ``activations``, as in stock; 1/m under ``weights``.
    What a rank brings under sequence parallelism TransformerEngine wants in half words.

    Args:
        asked: as for :func:`require_float8`, and the next two.
        config: likewise.
        cut: likewise.
        tokens: of a micro-batch, of one rank of context parallelism.

    Raises:
        UserError: naming the flag, the multiple and what was given.
    """
    parts = 1 if asked.exchange == "activations" else cut.m
    of = math.lcm(WORD * parts, WORD // 2 * cut.size if config.sequence_parallel else 1)
    if config.fp8 and tokens % of:
        raise UserError(
            f"--seq-length: micro-batches must be of a multiple of {of} tokens for FP8 under"
            f" --helix-m {cut.m} --helix-n {cut.n}, got {tokens}; use {multiples(tokens, of)} of"
            f" them, or leave --fp8-format {config.fp8} away"
        )


def _of_a_rank(config: Any, cut: HelixLayout) -> Iterator[tuple[str, str, int]]:
    """What a rank stores of the axes that are cut: the flag, of what, how many."""
    heads, groups = cut.num_attention_heads // cut.n, cut.num_query_groups // cut.n
    yield "--kv-channels", "columns of the output projection", heads * cut.segment_size
    yield "--kv-channels", "rows of the QKV projection", groups * cut.slots * cut.segment_size
    if has_dense_layers(config):
        features = padded(config.ffn_hidden_size, cut.size) // cut.size
        yield "--ffn-hidden-size", "features", features

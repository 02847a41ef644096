"""Where the documents of a packed row begin and end, read off Megatron's parameters of it.

What helix cannot deal out is refused here, each by its name.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_helix.basics.errors import UserError

# What a row's documents are read from.
_READ = (
    *("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"),
    *("max_seqlen_q", "max_seqlen_kv", "local_cp_size", "cp_group"),
)


class _Known(NamedTuple):
    """The ends of a row's documents, and what they were read from."""

    given: list[Any]
    written: list[int | None]
    ends: tuple[int, ...]

    def are(self, given: list[Any], written: list[int | None]) -> bool:
        """Whether they were read from these very objects, unwritten since."""
        same = all(a is b for a, b in zip(self.given, given, strict=True))
        return same and self.written == written


def document_ends(packed: PackedSeqParams, tokens: int) -> tuple[int, ...]:
    """Where the documents of a row of ``tokens`` begin and end, ``(0, ..., tokens)``.

    Read once for a micro-batch, since a GPU is asked for it; anew where the parameters were changed
    for another.

    Raises:
        UserError: for what helix cannot deal out: ends that do not add up, empty documents but
            those at the row's end, padding between documents, and rows that context parallelism has
            cut.
    """
    given = [getattr(packed, name) for name in _READ]
    written = [_writes(x) for x in given]
    known: _Known | None = getattr(packed, "helix_ends", None)
    if known is None or not known.are(given, written):
        known = _Known(given, written, _read_ends(packed))
        packed.helix_ends = known  # type: ignore[attr-defined]
    ends = known.ends
    if ends[-1] != tokens:
        raise UserError(
            f"packed_seq_params: documents must add up to the row's {tokens} tokens, got"
            f" cu_seqlens_q that ends at {ends[-1]}; give padding a document of its own"
        )
    return ends


def _writes(x: Any) -> int | None:
    """How often a tensor was written to."""
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else None


def _read_ends(packed: PackedSeqParams) -> tuple[int, ...]:
    if packed.qkv_format != "thd":
        raise UserError(
            "packed_seq_params: qkv_format must be thd, of documents in one row, got"
            f" {packed.qkv_format!r}; leave packed_seq_params away where rows are not packed"
        )
    if packed.cp_group is not None or (packed.local_cp_size or 1) > 1:
        raise UserError(
            "packed_seq_params: rows under --helix-m > 1 must be whole, got cp_group or"
            f" local_cp_size {packed.local_cp_size}; leave context parallelism away"
        )
    ends = _listed("cu_seqlens_q", packed.cu_seqlens_q)
    for name in ("cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        other = getattr(packed, name)
        if other is None or other is packed.cu_seqlens_q:  # a GPU is not asked twice
            continue
        if _listed(name, other) != ends:
            raise UserError(
                f"packed_seq_params: {name} must be equal to cu_seqlens_q under --helix-m > 1, got"
                f" {_some(other.tolist())} and {_some(ends)}; make padding part of its document"
            )
    while len(ends) > 2 and ends[-1] == ends[-2]:  # Megatron fills cu_seqlens up with them
        ends.pop()
    for document, (start, end) in enumerate(pairwise(ends)):
        if end <= start:
            raise UserError(
                f"packed_seq_params: document {document} must have a token or more, got"
                f" cu_seqlens_q from {start} to {end}; leave empty documents away"
            )
    if len(ends) < 2 or ends[0]:
        raise UserError(
            f"packed_seq_params: cu_seqlens_q must begin with 0 and end a document or more, got"
            f" {_some(ends)}; give where every document ends"
        )
    longest = max(end - start for start, end in pairwise(ends))
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        most = getattr(packed, name)
        if most is not None and int(most) < longest:
            raise UserError(
                f"packed_seq_params: {name} must be the longest document's tokens or more"
                f" ({longest}), got {int(most)}; give the length of the longest document"
            )
    return tuple(ends)


def _listed(name: str, ends: Any) -> list[int]:
    """The numbers of one of the ``cu_seqlens``."""
    is_tensor = isinstance(ends, torch.Tensor)
    if not is_tensor or ends.dim() != 1 or ends.is_floating_point() or ends.dtype == torch.bool:
        found = f"{ends.dtype} of shape {tuple(ends.shape)}" if is_tensor else type(ends).__name__
        raise UserError(
            f"packed_seq_params: {name} must be a tensor of integers with one dimension, got"
            f" {found}; give where every document of the row ends"
        )
    return ends.tolist()


def _some(ends: list[int]) -> str:
    return str(ends if len(ends) < 9 else [*ends[:4], "...", ends[-1]]).replace("'", "")

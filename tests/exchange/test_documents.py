"""Where the documents of a row end, and the rows that are refused."""

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_helix.exchange.documents import document_ends
from tests.packed_case import params


def with_ends(*ends: int, **fields: Any) -> PackedSeqParams:
    """Parameters of these ends."""
    given = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(
        **{"qkv_format": "thd", "cu_seqlens_q": given, "cu_seqlens_kv": given, **fields}
    )


OTHER = torch.tensor([0, 6, 16], dtype=torch.int32)
BAD = {
    "too short": (with_ends(0, 5, 12), "documents must add up to the row's 16 tokens, got .* 12;"),
    "too long": (with_ends(0, 5, 20), "documents must add up to the row's 16 tokens, got .* 20;"),
    "empty": (with_ends(0, 5, 5, 16), "document 1 must have a token or more, got .* from 5 to 5;"),
    "backwards": (with_ends(0, 9, 5, 16), "document 1 must have a token or more, got .* 9 to 5;"),
    "no beginning": (with_ends(3, 16), r"cu_seqlens_q must begin with 0 .*, got \[3, 16\];"),
    "none": (with_ends(0), r"cu_seqlens_q must begin with 0 and end a document or more, got \[0\]"),
    "other keys": (
        with_ends(0, 5, 16, cu_seqlens_kv=OTHER),
        r"cu_seqlens_kv must be equal to cu_seqlens_q .*, got \[0, 6, 16\] and \[0, 5, 16\];",
    ),
    "padding between": (
        with_ends(0, 5, 16, cu_seqlens_q_padded=OTHER),
        r"cu_seqlens_q_padded must be equal to cu_seqlens_q",
    ),
    "not in a row": (with_ends(0, 16, qkv_format="bshd"), "qkv_format must be thd, .* got 'bshd';"),
    "cut by ranks": (with_ends(0, 16, local_cp_size=2), "rows under --helix-m > 1 must be whole"),
    "no ends": (
        PackedSeqParams(qkv_format="thd"),
        "cu_seqlens_q must be a tensor of integers with one dimension, got NoneType;",
    ),
    "a list": (
        PackedSeqParams(qkv_format="thd", cu_seqlens_q=[0, 16]),
        "cu_seqlens_q must be a tensor of integers with one dimension, got list;",
    ),
    "fractions": (
        PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0.0, 16.0])),
        r"cu_seqlens_q must be a tensor of integers .*, got torch\.float32 of shape \(2,\);",
    ),
    "rows of a batch": (
        with_ends(0, 16, cu_seqlens_kv=torch.tensor([[0, 16], [0, 16]])),
        r"cu_seqlens_kv must be a tensor of integers .*, got torch\.int64 of shape \(2, 2\);",
    ),
    "longer than the longest": (
        with_ends(0, 5, 16, max_seqlen_q=11, max_seqlen_kv=torch.tensor(10)),
        r"max_seqlen_kv must be the longest document's tokens or more \(11\), got 10;",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rows_are_refused(bad: str) -> None:
    packed, message = BAD[bad]
    with pytest.raises(ValueError, match=rf"^packed_seq_params: {message}") as refused:
        document_ends(packed, 16)
    assert "\n" not in str(refused.value)


def test_ends_may_be_given_twice_and_filled_up() -> None:
    ends = torch.tensor([0, 5, 16], dtype=torch.int32)
    padded = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends}
    assert document_ends(with_ends(0, 5, 16, **padded), 16) == (0, 5, 16)
    assert document_ends(with_ends(0, 5, 16, 16, 16), 16) == (0, 5, 16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_ends_are_integers_of_any_size(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 5, 16], dtype=dtype)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)
    assert document_ends(packed, 16) == (0, 5, 16)


def test_ends_are_read_once_for_a_micro_batch() -> None:
    packed = params([5, 11])
    read = document_ends(packed, 16)
    assert document_ends(packed, 16) is read
    packed.cu_seqlens_q[1] = 7  # a loop's own buffer, with the next micro-batch in it
    assert document_ends(packed, 16) == (0, 7, 16)
    packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.tensor([0, 9, 16])
    assert document_ends(packed, 16) == (0, 9, 16)


def test_ends_made_while_inferring_are_read() -> None:
    with torch.inference_mode():
        packed = params([5, 11])
    assert document_ends(packed, 16) == (0, 5, 16)

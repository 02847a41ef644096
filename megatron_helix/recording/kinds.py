"""Kinds of collectives, as the ledger names them."""

POINT_TO_POINT = ("send", "recv")

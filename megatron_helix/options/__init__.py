"""The flags: their parser, what follows from them, and what is refused beside them."""

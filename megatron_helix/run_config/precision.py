"""Number formats of weights and activations."""

from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]
ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}  # weights, activations

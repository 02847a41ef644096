"""Generation in the middle of a training: the model leaves it as it came.

Nothing is drawn from a generator of the training: dropout is off, the noise of MoE routers, which
Megatron leaves on in evaluation, is turned off, and tokens are drawn from a generator of their own.
Gradients are not touched, for no graph is built. What is left are attributes: the mode of every
module, the plan it obeys, the stream that a pipeline stage was handed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Generation with ``model``; afterwards every attribute of its modules is as before.

    Args:
        model: a chunk, not wrapped; its weights are neither copied nor moved.
    """
    held = [model.config, *_holders(model)]
    before = [dict(vars(holder)) for holder in held]
    model.config.moe_input_jitter_eps = None  # type: ignore[union-attr]
    try:
        yield
    finally:
        for holder, attributes in zip(held, before, strict=True):
            vars(holder).clear()
            vars(holder).update(attributes)


def _holders(model: torch.nn.Module) -> Iterator[Any]:
    """The modules, and what some of them share of the block's ends."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        yield module
        for name in ("helix_ends", "helix_vocabulary"):
            if (one := vars(module).get(name)) is not None:
                shared[id(one)] = one
    yield from shared.values()

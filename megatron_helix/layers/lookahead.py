"""Which gathered weight comes next, so that its gather can run beside the GEMM before it.

Within a decoder block the linears of the ``weights`` exchange are used in a fixed order: forward
through the layers, and back. A gather is begun early only where the next use is certain, since one
that nobody waits for is traffic for nothing. Under recompute a layer is run forward in the middle
of the backward pass, so nothing is begun across the border of a layer there. Where Megatron itself
gathers parameters during the forward pass (``--overlap-param-gather``), a shard is up to date only
once its own linear is called, and nothing is begun in that pass at all.

What follows the border of a layer is gathered with the rest of that layer, as long as nothing is in
FP8: ranks meet once a layer and pass.

Tested on gloo ranks that are told to begin early; over NCCL it ran on two and on four GPUs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.exchange.float8_scales import Scales


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The linears before and after one in its decoder block.

    Attributes:
        preceding: the linear before; None for the block's first.
        following: the linear after; None for the block's last.
        beyond: the linear after ``following`` where that multiplies too little to hide a gather: of
            the QKV projection that of a dense MLP, past the output projection.
        layer: all linears of its layer, in the order of their use.
        recompute: whether linears are run again in the backward pass.
        forward_early: whether shards are up to date before the forward pass reaches them.
        sums_later: whether gradients may be added up later than autograd is told.
        scales: what all linears of the model agree on scales in FP8 with; None where a shard may
            not be up to date before its own linear is called.
    """

    preceding: Any = None
    following: Any = None
    beyond: Any = None
    layer: tuple[Any, ...] = ()
    recompute: bool = False
    forward_early: bool = True
    sums_later: bool = False
    scales: Scales | None = None

    def of_this_pass(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(Used next if this is the forward pass, used next in the backward pass).

        Nothing where that is not certain; across the border of a layer all that the layer uses,
        its nearest first.
        """
        # What torch's own checkpointing asks: a forward inside a backward pass is a recompute.
        recomputing = torch._C._current_graph_task_id() != -1
        known = self.following in self.layer if recomputing else self.forward_early
        following = self._with_its_layer(self.following) if known else ()
        known = self.preceding in self.layer or not self.recompute
        return following, self._with_its_layer(self.preceding) if known else ()

    def _with_its_layer(self, neighbour: Any) -> tuple[Any, ...]:
        if neighbour is None:
            return ()
        others = () if neighbour in self.layer else neighbour.neighbours.layer
        return (neighbour, *(one for one in others if one is not neighbour))


def link(
    model: list[torch.nn.Module],
    ends: tuple[type, ...],
    *,
    forward_early: bool = True,
    sums_later: bool = False,
) -> list[torch.nn.Module]:
    """Tell every linear of the model's decoder blocks its neighbours.

    Args:
        model: Megatron's model chunks.
        ends: the linear classes, in the order in which a layer uses them.
        forward_early: whether all shards are up to date when a forward pass begins.
        sums_later: whether nobody reduces gradients before a backward pass is through.

    Returns:
        ``model``; the form of Megatron's ``pre_wrap_hooks``.
    """
    known = {
        "forward_early": forward_early,
        "sums_later": sums_later,
        "scales": Scales() if forward_early else None,
    }
    for chunk in model:
        for block in chunk.modules():
            if isinstance(block, TransformerBlock):
                _link_block(block, ends, known)
    return model


def _link_block(block: TransformerBlock, ends: tuple[type, ...], known: dict[str, Any]) -> None:
    layers = [_in_order_of_use(layer, ends) for layer in block.layers]
    chain = [linear for layer in layers for linear in layer]
    its_layer = {linear: tuple(layer) for layer in layers for linear in layer}
    recompute = _runs_linears_again(block.config)
    third = {layer[0]: layer[2] for layer in layers if len(layer) == len(ends)}
    for place, linear in enumerate(chain):
        linear.neighbours = Neighbours(
            preceding=chain[place - 1] if place else None,
            following=chain[place + 1] if place + 1 < len(chain) else None,
            beyond=third.get(linear),
            layer=its_layer[linear],
            recompute=recompute,
            **known,
        )


def _in_order_of_use(layer: torch.nn.Module, ends: tuple[type, ...]) -> list[Any]:
    linears = [module for module in layer.modules() if isinstance(module, ends)]
    return sorted(linears, key=lambda linear: [isinstance(linear, end) for end in ends].index(True))


def _runs_linears_again(config: TransformerConfig) -> bool:
    modules = config.recompute_modules or []
    return config.recompute_granularity == "full" or "mlp" in modules

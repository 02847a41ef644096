"""Megatron's parallel linears with helix shards, and the exchange at their head-side end.

The linear classes of a layer spec (local or TransformerEngine) are subclassed, not wrapped:
parameter names, sequence parallelism and delayed weight gradients stay Megatron's. A shard is
contiguous in a reordering of the canonical weight, so the tensor-parallel linear runs on it as it
stands; only the initialisation, the checkpoint and the exchange know of the order.

What a forward does follows ``plan``, which the layer sets for every micro-batch: under ``weights``
TransformerEngine's own linear with a gathered weight (:mod:`megatron_helix.layers.engine`) or that
of :mod:`megatron_helix.exchange.weights`, else Megatron's own, with the ``activations`` exchange
behind the QKV projection and before the output projection.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch

from megatron_helix.exchange.activations import context_to_segments, qkv_to_whole_heads
from megatron_helix.exchange.decode import qkv_to_every_rank
from megatron_helix.exchange.distributed_weight import DistributedShard, FactorStore
from megatron_helix.exchange.gathered_weight import Ahead, GatheredWeight, whole
from megatron_helix.exchange.padding import own_channels, own_tiles
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.shards import Shards
from megatron_helix.exchange.weights import column_linear, row_linear
from megatron_helix.layers import lookahead
from megatron_helix.layers.engine import EngineLinear, in_float8, takes_gathered_weights
from megatron_helix.layers.norm import Norm, input_norm
from megatron_helix.layers.weight_forms import WeightForms
from megatron_helix.partition.checkpoint import tile_in_canonical_order
from megatron_helix.partition.layout import PADDING, HelixLayout
from megatron_helix.partition.process_groups import HelixGroups, register
from megatron_helix.partition.tiles import stored

Init = Callable[[torch.Tensor], Any]


def in_tile_order(
    init_method: Init, order: torch.Tensor, dim: int, *, rank: int, size: int
) -> Init:
    """``init_method`` followed by a reordering of the whole weight into tile order.

    With ``--use-cpu-initialization`` every rank draws the whole weight and keeps its shard: drawing
    the canonical weight first makes the global weights equal stock's. A shard drawn on its own (GPU
    initialisation) is as random in any order and is left as drawn, but for padding, which is zero.

    Args:
        init_method: of the canonical weight.
        order: canonical index of every stored one, of all ranks in turn.
        dim: that is cut.
        rank: of those that share the weight.
        size: how many.
    """
    padding = order == PADDING
    own = padding.chunk(size)[rank].nonzero().squeeze(1)

    def init(weight: torch.Tensor) -> None:
        if weight.size(dim) == order.numel():
            shape = [*weight.shape]
            shape[dim] -= int(padding.sum())
            canonical = weight.new_empty(shape)
            init_method(canonical)
            with torch.no_grad():
                weight.copy_(stored(canonical, order, dim))
            return
        init_method(weight)
        if len(own):
            with torch.no_grad():
                weight.index_fill_(dim, own.to(weight.device), 0)

    return init


class HelixLinear(torch.nn.Module):
    """What all four share: the shards of the whole tensor-parallel group, and the plan.

    Comes before a linear class of Megatron's, which it extends.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    plan = Plan(exchange="activations", split="batch")
    shards: Shards
    neighbours = lookahead.Neighbours()

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        layout: HelixLayout,
        groups: HelixGroups | None = None,
        tp_group: Any = None,  # attention passes its head-axis group; shards span all
        **kwargs: Any,
    ):
        groups = groups or register(layout, tp_group)
        super().__init__(input_size, output_size, tp_group=groups.tp, **kwargs)
        self.helix_layout, self.helix_groups = layout, groups

    @cached_property
    def forms(self) -> WeightForms:
        """What is gathered of the weight, by what multiplies it."""
        engine = isinstance(self, EngineLinear)
        among = self.helix_groups.dim, self.helix_groups.home
        scales = self.neighbours.scales
        return WeightForms(self.weight, self.shards, *among, engine=engine, scales=scales)

    @cached_property
    def _input_norm(self) -> Norm:
        return input_norm(self)

    def _column(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gathered column-parallel linear, with Megatron's contract about the bias."""
        if engine := self._engine(x):
            return self._by_engine(engine, x, self._whole_bias)
        weight = self._gathered()
        y = column_linear(self._input_norm(x), weight, self.helix_groups.head, self._ahead())
        return self._with_bias(y, self._whole_bias())

    def _row(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gathered row-parallel linear, with Megatron's contract about the bias.

        In half precision TransformerEngine's linear has nothing to fuse here, and would want a copy
        of the whole weight for either pass, and of its gradient, since its shards are columns.
        """
        engine = self._engine(x)
        if engine and in_float8():
            return self._by_engine(engine, x, lambda: self.bias)
        y = row_linear(x, self._gathered(), self.helix_groups.head, self._ahead())
        return self._with_bias(y, self.bias)

    def _engine(self, x: torch.Tensor) -> EngineLinear | None:
        """TransformerEngine's linear, where it is one; it would multiply fp32 in TF32."""
        return self if isinstance(self, EngineLinear) and x.dtype != torch.float32 else None

    def _gathered(self) -> GatheredWeight:
        """The head group's weight for a GEMM that reads it either way."""
        self.forms.keep(self.plan, training=self.training)
        return self.forms.either_way()

    def _ahead(self) -> Ahead:
        """What comes after this weight in either pass.

        All linears of a block share a plan but for ``gather``: a kept weight is not begun again.
        """
        following, preceding = self.neighbours.of_this_pass()
        beyond = self.neighbours.beyond if following else None
        behind = self.neighbours.following
        return Ahead(
            forward=_gathered_together([linear.forms.forward for linear in following]),
            bias=following[0].gathered_bias if following else None,
            beyond=beyond and beyond.forms.forward,
            backward=_gathered_together([linear.forms.backward for linear in preceding]),
            behind=behind and behind.forms.backward,
            sums_later=self.neighbours.sums_later,
        )

    def _by_engine(self, engine: EngineLinear, x: torch.Tensor, bias: Callable[[], Any]) -> Any:
        """TransformerEngine's own linear, over the head-axis group."""
        ahead, factors = self._ahead(), FactorStore()

        def lend() -> tuple[torch.Tensor, torch.Tensor | None]:
            lent = bias()
            quantizer = engine.weight_quantizer()
            forms = self.forms
            forms.keep(self.plan, training=self.training)
            factors.shard = DistributedShard.of(*forms.for_engine(quantizer), ahead)
            # TransformerEngine finds a bias' gradient in the weight's GEMM, but for FP8.
            in_scales = quantizer is not None
            factors.wanted = forms.takes_factors(quantizer) and (lent is None or in_scales)
            return factors.shard, lent

        y = engine.multiply(x, lend, self.helix_groups.head, factors)
        factors.shard.release()
        ahead.begin_beyond()
        return y

    @cached_property
    def gathered_bias(self) -> GatheredWeight | None:
        """The bias of the head group's features, none where there is none.

        Over the group of gradients, so that neither it nor the weight waits for the other.
        """
        if self.bias is None or not self.bias.numel() or self.shards.axis:
            return None
        return GatheredWeight(self.bias, self.shards, self.helix_groups.home)

    def _whole_bias(self) -> torch.Tensor | None:
        """The bias of the head group's features, with its gradient."""
        later = self.neighbours.sums_later
        return self.gathered_bias and whole(self.gathered_bias, sums_later=later)

    def _with_bias(
        self, y: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bias is None or not bias.numel():
            return y, None
        return (y, bias) if _skips_bias(self) else (y + bias, None)


def _skips_bias(linear: Any) -> bool:
    """Whether the bias is returned instead of added (Megatron's and TransformerEngine's names)."""
    return bool(getattr(linear, "skip_bias_add", False) or getattr(linear, "te_return_bias", False))


class _Tiled(HelixLinear):
    """A linear of attention: its shards are tiles, in memory and in checkpoints."""

    tiled: tuple[str, ...]  # the parameters that are cut along the shards' axis
    heads: Callable[[HelixLayout], int]  # heads of a head group that are packed along it
    canonical_order: Callable[[HelixLayout], torch.Tensor]
    axis: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        layout: HelixLayout,
        groups: HelixGroups,
        init_method: Init,
        **kwargs: Any,
    ):
        order = self.canonical_order(layout)
        sizes = [output_size, input_size]
        sizes[self.axis] = order.numel()  # what Megatron asks for, and padding
        own = {"rank": groups.tp.rank(), "size": groups.tp.size()}
        super().__init__(
            sizes[1],
            sizes[0],
            layout=layout,
            groups=groups,
            init_method=in_tile_order(init_method, order, self.axis, **own),
            **kwargs,
        )
        self.tile_order = order
        self.shards = Shards(
            axis=self.axis,
            outer=self.heads(layout) * layout.segment_blocks,
            lengths=layout.runs,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, with every tile described by its canonical rows or columns."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        for name in self.tiled:
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = tile_in_canonical_order(
                    state[f"{prefix}{name}"],
                    self.tile_order,
                    layout=self.helix_layout,
                    rank=self.helix_groups.tp.rank(),
                    axis=self.axis,
                    sharded_offsets=sharded_offsets,
                )
        return state


class _QKV(_Tiled):
    """``linear_qkv``: all tokens of the stream in, whole heads for 1/m of the tokens out.

    The output is what stock attention expects on a tensor-parallel group of n ranks: ``[s, b/m,
    ...]`` or ``[s/m, b, K/n * slots * d]`` by the split; under ``scores`` it is ``[s, b, K/n *
    slots * d/m]``.
    """

    axis = 0
    tiled = ("weight", "bias")
    heads = staticmethod(lambda layout: layout.num_query_groups // layout.n * layout.slots)
    canonical_order = staticmethod(HelixLayout.qkv_rows)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plan.exchange == "weights":
            return self._column(x)
        qkv, bias = super().forward(x, *args, **kwargs)
        if self.plan.exchange == "activations":
            among = self.helix_layout, self.helix_groups.dim
            qkv = qkv_to_whole_heads(qkv, *among, self.plan.split, self.plan.documents)
        elif self.plan.exchange == "partials":
            qkv = qkv_to_every_rank(qkv, self.helix_layout, self.helix_groups.dim)
        else:
            qkv = own_channels(qkv, self.helix_layout, self.helix_groups.segment)
        return qkv, bias


class _Proj(_Tiled):
    """``linear_proj``: the context of my tokens in, the stream out; inverse of :class:`_QKV`."""

    axis = 1
    tiled = ("weight",)
    heads = staticmethod(lambda layout: layout.num_attention_heads // layout.n)
    canonical_order = staticmethod(HelixLayout.proj_columns)

    def forward(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plan.exchange == "weights":
            return self._row(context)
        if self.plan.exchange == "activations":
            among = self.helix_layout, self.helix_groups.dim
            context = context_to_segments(context, *among, self.plan.split, self.plan.documents)
        else:
            context = own_tiles(context, self.helix_layout, self.helix_groups.segment)
        return super().forward(context, *args, **kwargs)


class _FC1(HelixLinear):
    """``linear_fc1`` of a dense MLP: stock shards; under ``weights``, F/n features of my tokens."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.shards = Shards(axis=0, outer=2 if config.gated_linear_unit else 1)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plan.exchange == "weights":
            return self._column(x)
        return super().forward(x, *args, **kwargs)


class _FC2(HelixLinear):
    """``linear_fc2`` of a dense MLP; inverse of :class:`_FC1`."""

    shards = Shards(axis=1)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plan.exchange == "weights":
            return self._row(x)
        return super().forward(x, *args, **kwargs)


# In the order in which a layer uses them.
_ENDS = {"linear_qkv": _QKV, "linear_proj": _Proj, "linear_fc1": _FC1, "linear_fc2": _FC2}


def link(model: list[torch.nn.Module], **known: bool) -> list[torch.nn.Module]:
    """Tell the linears of a model which weight each pass needs next (:func:`lookahead.link`)."""
    return lookahead.link(model, tuple(_ENDS.values()), **known)


@cache
def helix_linear(name: str, linear: type) -> type:
    """The spec's class for submodule ``name`` (``linear_qkv`` and so on), with helix shards."""
    engine = (EngineLinear,) if takes_gathered_weights(linear) else ()
    return type(f"Helix{linear.__name__}", (_ENDS[name], *engine, linear), {})


def _gathered_together(forms: Sequence[GatheredWeight | None]) -> list[GatheredWeight]:
    """All of them where they are gathered as they are, else the nearest alone.

    Of FP8 each has a scale to wait for; a linear that was not used yet has no form.
    """
    if any(type(one) is not GatheredWeight for one in forms):
        forms = forms[:1]
    return [one for one in forms if one is not None]

"""One attention layer on m x n CPU ranks, stock or helix, from the same weights and input.

What ``few_query_groups.py`` measures. Megatron is imported late: the CPU device must be on first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.exchange.tokens import from_block_order, to_block_order
from megatron_helix.kernels.collectives import gather
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.tiles import stored
from megatron_helix.recording.comm_ledger import CommLedger, install

STOCK = "stock"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention layer and its micro-batch, on m x n ranks; sizes in elements."""

    heads: int = 16
    groups: int = 2
    head_dim: int = 64
    hidden: int = 1024
    sequence: int = 128
    batch: int = 8
    m: int = 8
    n: int = 2

    def layout(self) -> HelixLayout:
        """The partition."""
        return HelixLayout(
            m=self.m,
            n=self.n,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            kv_channels=self.head_dim,
            rotary_dim=self.head_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the layer; without an exchange it is stock's."""

    exchange: str = ""
    split: str = ""
    sequence_parallel: bool = False

    @property
    def name(self) -> str:
        """How it is printed."""
        words = [self.exchange or STOCK, self.split, "sp" * self.sequence_parallel]
        return "-".join(word for word in words if word)


class Layer:
    """This rank's part of the attention layer, its input and its output's gradient."""

    def __init__(self, shape: Shape, variant: Variant):
        self.shape, self.variant = shape, variant
        self.module, self.rotary, self.tp = _build(shape, variant)
        whole = [_random(seed, shape.sequence, shape.batch, shape.hidden) for seed in (1, 2)]
        x, self.y_grad = (self._mine(tensor).contiguous() for tensor in whole)
        self.x = x.requires_grad_()

    def step(self) -> torch.Tensor:
        """Forward and backward; the output."""
        self.x.grad = None
        self.module.zero_grad()
        y, _ = self.module(self.x, None, rotary_pos_emb=self.rotary)
        y.backward(self.y_grad)
        return y.detach()

    def sent_bytes(self) -> int:
        """What the rank that sends most sends in one forward and backward."""
        ledger = CommLedger()
        uninstall = install(ledger)
        self.step()
        uninstall()
        sent = torch.tensor(sum(sent.sent_bytes for sent in ledger.take().values()))
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return int(sent)

    def whole(self) -> list[torch.Tensor]:
        """Output and input gradient of all tokens ``[s, b, hidden]``, from all ranks."""
        y = self.step()
        assert self.x.grad is not None
        return [self._all(y), self._all(self.x.grad)]

    def _converted(self, part: torch.Tensor, convert: Any) -> torch.Tensor:
        """``convert``, where the stream has another token order than stock's."""
        if not self.variant.exchange or not self.module.plan.has_own_order:
            return part
        return convert(part, self.module.plan, self.shape.layout(), self.module.helix_groups.dim)

    def _mine(self, whole: torch.Tensor) -> torch.Tensor:
        """A rank's tokens of the stream."""
        if not self.variant.sequence_parallel:
            return whole
        part = whole.chunk(dist.get_world_size())[dist.get_rank()]
        return self._converted(part, to_block_order)

    def _all(self, part: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`_mine`."""
        if not self.variant.sequence_parallel:
            return part
        part = self._converted(part, from_block_order).contiguous()
        return gather(part, self.tp)


def _build(shape: Shape, variant: Variant) -> tuple[Any, torch.Tensor, dist.ProcessGroup]:
    """The attention of Megatron's local spec, with the same global weights for every variant.

    Also its rotary embeddings and the tensor-parallel group.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_helix.exchange.plan import Plan
    from megatron_helix.exchange.strategy import Choice
    from megatron_helix.layers.layer_spec import helixify

    layout = shape.layout()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=layout.size,
        sequence_parallel=variant.sequence_parallel,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec: Any = get_gpt_layer_local_spec()
    if variant.exchange:
        choice = Choice(exchange=variant.exchange, split=variant.split or "auto")
        spec = helixify(spec, layout, choice)
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
    module = build_module(
        spec.submodules.self_attention, config=config, layer_number=1, pg_collection=groups
    )
    if variant.split:
        module.set_plan(Plan(exchange=variant.exchange, split=variant.split))
    rows = (shape.heads + 2 * shape.groups) * shape.head_dim
    columns = shape.heads * shape.head_dim
    orders = (layout.qkv_rows(), layout.proj_columns())
    if not variant.exchange:
        orders = (torch.arange(rows), torch.arange(columns))
    weights = (_random(3, rows, shape.hidden), _random(4, shape.hidden, columns))
    with torch.no_grad():
        for axis, linear in enumerate((module.linear_qkv, module.linear_proj)):
            mine = orders[axis].chunk(layout.size)[dist.get_rank()]
            linear.weight.copy_(stored(weights[axis], mine, axis) / shape.hidden**0.5)
    rotary = RotaryEmbedding(shape.head_dim, 1.0, use_cpu_initialization=True)(shape.sequence)
    return module, rotary, groups.tp


def _random(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))

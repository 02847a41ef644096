"""Gradients of a whole GPT model, as Megatron's data parallelism adds them up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers import vocabulary
from megatron_helix.layers.transformer_layer import HelixLayer
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.partition.layout import HelixLayout
from tests import block_case
from tests.block_case import Block
from tests.layers.test_layer_gradients import shard

S, B = 16, 8  # tokens of a sequence, sequences of a micro-batch
TABLES = ("output_layer.weight", "embedding.word_embeddings.weight")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GPT model, and how Megatron adds up its gradients."""

    block: Block
    words: int = 64
    tied: bool = False
    ddp: dict[str, Any] = field(default_factory=lambda: {"grad_reduce_in_fp32": True})

    def build(
        self,
        groups: ProcessGroupCollection,
        layout: HelixLayout | None = None,
        choice: Choice = Choice(),
    ) -> GPTModel:
        """It, on ``groups.tp``: stock, or cut by a layout; its weights are still to be loaded."""
        config, spec = block_case.describe(self.block, groups, layout, choice)
        model = GPTModel(
            config,
            spec,
            vocab_size=self.words,
            max_sequence_length=S,
            share_embeddings_and_output_weights=self.tied,
            position_embedding_type="rope",
            pg_collection=groups,
        ).to(self.block.dtype)
        return model if layout is None else vocabulary.extend([model])[0]

    def in_ddp(self, model: GPTModel) -> DistributedDataParallel:
        """In Megatron's data parallelism, which gives every weight its ``main_grad``."""
        config = DistributedDataParallelConfig(**self.ddp)
        return DistributedDataParallel(model.config, config, model)

    def drawn(self, whole: GPTModel, dtype: torch.dtype) -> Tensors:
        """Canonical weights, of numbers that ``dtype`` has."""
        weights = {}
        for name, weight in whole.named_parameters():
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            random = torch.randn(*weight.shape, generator=seed) / weight.size(-1) ** 0.5
            is_norm = "norm" in name and name.endswith("weight")
            weights[name] = (random + is_norm).to(dtype)
        return weights

    def part(self, name: str, whole: torch.Tensor, layout: HelixLayout) -> torch.Tensor:
        """This rank's part of a weight."""
        rank = dist.get_rank()
        if name in TABLES:
            return whole.chunk(layout.size)[rank]
        return shard(whole, name, layout, rank, self.block.gated)

    def load(self, model: GPTModel, weights: Tensors, layout: HelixLayout | None) -> None:
        """Give the model the canonical weights, or its part of them."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                whole = weights[name]
                weight.copy_(whole if layout is None else self.part(name, whole, layout))


def set_plan(model: torch.nn.Module, plan: Plan) -> None:
    """What micro-batches take from the next one on."""
    for layer in model.modules():
        if isinstance(layer, HelixLayer):
            layer._plans[S, B, False] = plan


def backward(model: torch.nn.Module, seed: int, words: int) -> None:
    """One micro-batch, every token's loss weighed differently."""
    draw = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(words, (B, S), generator=draw) for _ in range(2))
    weights = torch.randn(B, S, generator=draw)
    losses = model(tokens, torch.arange(S).expand(B, S), None, labels=labels)
    custom_backward((losses * weights).sum(), None)  # as Megatron's schedules call it


def step(
    model: DistributedDataParallel, plans: Sequence[Plan | None], words: int, number: int = 0
) -> Tensors:
    """The gradients of a numbered step of a micro-batch for every plan; of stock for none."""
    model.zero_grad_buffer()
    last = (number + 1) * len(plans) - 1
    for seed, plan in enumerate(plans, number * len(plans)):
        if plan is not None:
            set_plan(model, plan)
        if seed < last:
            with model.no_sync():
                backward(model, seed, words)
        else:
            backward(model, seed, words)
    finish_step([model])
    finalize_model_grads([model])
    trained = ((name, p) for name, p in model.module.named_parameters() if p.requires_grad)
    return {name: weight.main_grad.clone() for name, weight in trained}


def reference(model: GPTModel, microbatches: int, words: int, number: int = 0) -> Tensors:
    """The gradients of the same step on one rank."""
    model.zero_grad()
    for seed in range(number * microbatches, (number + 1) * microbatches):
        backward(model, seed, words)
    return {name: weight.grad for name, weight in model.named_parameters()}

"""A model, a layout and a batch on a number of ranks: who shares what, and whether it can run.

Global ranks run tensor-parallel first, then context, data and pipeline parallel, as Megatron's
default order ``tp-cp-ep-dp-pp`` has it; for experts it is etp, ep, expert data, pipeline parallel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.strategy import (
    Choice,
    cache_split,
    decode_plan,
    packed_plan,
    resolve,
)
from megatron_helix.exchange.traffic import BlockShape, packed
from megatron_helix.machine.hardware import Hardware
from megatron_helix.partition.features import padded, require_features
from megatron_helix.partition.layout import HelixLayout, require_divides
from megatron_helix.planner.sizes import layout_of, padded_rows
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import ELEMENT_BYTES, Precision

# A forward pass of the training loop, loss included, is what experiments call prefill: layouts
# compare by it. The planner's prefill and decode serve.
PHASES = ("train", "forward", "prefill", "decode")


def require_phase(phase: str) -> None:
    """Refuse what is none of :data:`PHASES`.

    Raises:
        UserError: naming them.
    """
    if phase not in PHASES:
        raise UserError(f"phase: must be one of {', '.join(PHASES)}, got {phase!r}")


def require_length(model: ModelConfig, batch: BatchConfig) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        UserError: naming both.
    """
    most = model.max_position_embeddings or batch.sequence_length
    if batch.sequence_length > most:
        raise UserError(
            f"sequence_length: must be at most {model.name}'s max_position_embeddings ({most}), got"
            f" {batch.sequence_length}; use shorter sequences"
        )


class Waste(NamedTuple):
    """What zeros that pad add to weights, as a part of them.

    Attributes:
        attention: to those of attention, where m does not divide a head's channels.
        mlp: to those of MLPs or experts, whose features their ranks do not divide.
    """

    attention: float
    mlp: float


@dataclass(frozen=True)
class Deployment:
    """A layout of a model on ``world_size`` ranks, for one phase.

    Args:
        model: the model.
        layout: how the ranks share it.
        batch: sequences of one step and their length. In ``decode`` a step is one new token of each
            sequence, and the length is that of the context in the KV cache.
        world_size: ranks.
        phase: one of :data:`PHASES`.
        precision: of weights and activations; fp16 scales its loss.
        machine: by which ``auto`` compares plans; None compares what they send, as on CPUs.
        padded_vocabulary: rows of the embedding, as ``--padded-vocab-size`` says them; None: what
            Megatron pads the model's vocabulary to.
        gradient_flags: of Megatron's, in which precision gradients are added up and sent.

    Raises:
        UserError: from :meth:`check`.
    """

    model: ModelConfig
    layout: LayoutConfig
    batch: BatchConfig
    world_size: int
    phase: str = "train"
    precision: Precision = "fp16"
    machine: Hardware | None = None
    padded_vocabulary: int | None = None
    gradient_flags: GradientFlags = GradientFlags()

    def check(self) -> "Deployment":
        """This deployment, if it can run.

        Raises:
            UserError: naming the field, the requirement and the value.
        """
        model, layout, batch = self.model, self.layout, self.batch
        require_phase(self.phase)
        require_length(model, batch)
        if batch.documents and self.phase != "train":
            raise UserError(
                f"documents: are packed for training, got phase {self.phase}; leave one away"
            )
        if batch.documents and (core := layout.core_attention or "spec") not in ("spec", "auto"):
            raise UserError(
                f"core_attention: must be spec or auto with packed documents, got {core}, which"
                " does not keep them apart; leave one away"
            )
        heads, groups = model.num_attention_heads, model.query_groups
        require_divides(
            "num_query_groups", groups, "num_attention_heads", heads, remedy="use a divisor"
        )
        dense = self.tp * layout.pp * layout.cp
        require_divides("tp (or m x n) x pp x cp", dense, "the number of ranks", self.world_size)
        require_divides("pp", layout.pp, "num_layers", model.num_layers)
        require_divides("gtp", layout.gtp, "ranks beside tp, pp and cp", self.batch_ranks)
        layout.require_model(model, self.precision)
        if layout.cp_comm_type == "a2a":
            require_divides("tp x cp (a2a)", self.tp * layout.cp, "num_query_groups", groups)
        if model.num_experts:
            expert = layout.ep * layout.etp * layout.pp
            require_divides("ep x etp x pp", expert, "the number of ranks", self.world_size)
            require_divides("ep", layout.ep, "num_experts", model.num_experts)
            self._require_features("etp", layout.etp)
            if model.add_bias_linear and layout.etp > 1:
                raise UserError(f"etp: experts with biases need 1, got {layout.etp}; use 1")
            if layout.gtp > 1:
                raise UserError(f"gtp: is predicted for dense models only, got {layout.gtp}; use 1")
        share = layout.micro_batch * self.batch_ranks
        require_divides("micro_batch x data-parallel ranks", share, "sequences", batch.sequences)
        if layout.is_helix:
            if layout.cp > 1 or layout.gtp > 1:
                raise UserError("cp, gtp: are predicted beside stock layouts only; use 1 with m, n")
            self.cut  # noqa: B018  # checks m and n
        else:
            require_divides("tp", self.tp, "num_attention_heads", heads)
            remedy = "choose a divisor or a multiple"
            if self.tp % groups:
                require_divides("tp", self.tp, "num_query_groups", groups, remedy=remedy)
        if not model.num_experts:
            self._require_features("tp", self.tp)
        if self.phase != "decode":
            ranks = self.tp * layout.cp
            require_divides("tp x cp", ranks, "sequence_length", batch.sequence_length)
        elif layout.cp > 1 or layout.gtp > 1 or layout.fsdp:
            raise UserError("cp, gtp, fsdp: are not predicted for decode; leave them out")
        self.plan  # noqa: B018  # checks exchange and split
        return self

    def _require_features(self, name: str, parts: int) -> None:
        """Check that ranks can share an MLP's features: stock's divide them."""
        features = self.model.ffn_hidden_size
        if self.layout.is_helix:
            require_features("ffn_hidden_size", features, parts)
        else:
            require_divides(name, parts, "ffn_hidden_size", features)

    @cached_property
    def features(self) -> int:
        """Features of an MLP, or of an expert, as its ranks store and compute them together."""
        parts = self.layout.etp if self.model.num_experts else self.tp
        return padded(self.model.ffn_hidden_size, parts)

    @property
    def waste(self) -> Waste:
        """What padding adds; stock has none."""
        return Waste(self.cut.waste, self.features / self.model.ffn_hidden_size - 1)

    @cached_property
    def tp(self) -> int:
        """Ranks T of a tensor-parallel group."""
        return self.layout.tensor_parallel_size

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.layout.pp

    @cached_property
    def batch_ranks(self) -> int:
        """Ranks that share the sequences of a batch: data parallel and gtp."""
        return self.world_size // (self.tp * self.layout.cp * self.layout.pp)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights and average their gradients."""
        return self.batch_ranks * self.layout.cp // self.layout.gtp

    @property
    def expert_replicas(self) -> int:
        """The same for the weights of experts."""
        return self.world_size // (self.layout.ep * self.layout.etp * self.layout.pp)

    @property
    def experts_apart(self) -> bool:
        """Whether experts have an optimizer and data-parallel ranks of their own.

        Megatron keeps them with the dense weights where they are cut as those are; its FSDP never.
        """
        cut = self.layout.ep > 1 or self.layout.etp != self.tp
        return bool(self.model.num_experts) and (cut or self.layout.fsdp == "megatron_fsdp")

    @property
    def weight_shards(self) -> tuple[int, int]:
        """Ranks that keep a part each of what a replica has of (dense, expert) weights: FSDP's."""
        return (self.replicas, self.expert_replicas) if self.layout.fsdp else (1, 1)

    @property
    def state_shards(self) -> tuple[int, int]:
        """The same of optimizer states."""
        sharded = self.layout.fsdp or self.layout.distributed_optimizer
        return (self.replicas, self.expert_replicas) if sharded else (1, 1)

    @cached_property
    def microbatches(self) -> int:
        """Micro-batches of a step."""
        return self.batch.sequences // (self.layout.micro_batch * self.batch_ranks)

    @property
    def in_loop(self) -> bool:
        """Whether Megatron's training loop runs, with a loss of every token."""
        return self.phase in ("train", "forward")

    @property
    def sequence(self) -> int:
        """New tokens of a sequence on a context-parallel rank in one micro-batch."""
        return 1 if self.phase == "decode" else self.batch.sequence_length // self.layout.cp

    @cached_property
    def tokens(self) -> int:
        """Tokens N of a micro-batch on one tensor-parallel group."""
        return self.layout.micro_batch * self.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens that a step of the whole machine processes."""
        return self.batch.sequences if self.phase == "decode" else self.batch.tokens

    @cached_property
    def sequence_parallel(self) -> bool:
        """Whether the stream between the linears is split over the tensor-parallel group."""
        return self.tp > 1 and self.phase != "decode"

    @property
    def stream_ranks(self) -> int:
        """Ranks that the stream's tokens are split over: all T, or none in decode.

        Without sequence parallelism every rank routes all tokens: each reaches its experts T times.
        """
        return self.tp if self.sequence_parallel else 1

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return ELEMENT_BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient as it is added up over micro-batches."""
        return self.gradient_flags.summed_bytes(self.precision, self.layout.fsdp)

    @property
    def sent_gradient_bytes(self) -> int:
        """Of a gradient as data-parallel ranks send it, which FSDP alone may do in another one."""
        return self.gradient_flags.sent_bytes(self.precision, self.layout.fsdp)

    @property
    def layers(self) -> int:
        """Layers of one stage."""
        return self.model.num_layers // self.layout.pp

    @property
    def kept_layers(self) -> int:
        """Of these, those whose gathered weights are kept for a step: the first ones."""
        if not self.plan.keeps_weights:
            return 0
        return min(self.layout.gather_layers or self.layers, self.layers)

    @property
    def plans(self) -> Iterator[tuple[Plan, int]]:
        """How layers of a stage gather, and how many do so."""
        yield self.plan, self.kept_layers or self.layers
        if 0 < self.kept_layers < self.layers:
            yield replace(self.plan, gather="microbatch"), self.layers - self.kept_layers

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding, with those that pad it."""
        return self.padded_vocabulary or padded_rows(self.model.vocab_size, self.tp)

    @cached_property
    def block(self) -> BlockShape:
        """What the closed forms of an exchange need."""
        return BlockShape(
            hidden=self.model.hidden_size,
            ffn=0 if self.model.num_experts else self.model.ffn_hidden_size,
            gated=self.model.gated,
            num_layers=self.model.num_layers,
        )

    @cached_property
    def cut(self) -> HelixLayout:
        """The m x n partition; 1 x T for a stock layout, whose ranks have a query group each."""
        m, n = self.layout.m or 1, self.layout.n or self.tp
        return layout_of(self.model, m, n, groups=self.tp if self.gathers_qkv else 0)

    @property
    def gathers_qkv(self) -> bool:
        """Whether stock has more tensor-parallel ranks than query groups.

        It gathers QKV over all of them then, and each takes the group that its heads belong to.
        """
        return not self.layout.is_helix and self.tp > self.model.query_groups

    @property
    def groups(self) -> int:
        """Query groups that all ranks of a tensor-parallel group attend with."""
        return self.cut.num_query_groups

    @cached_property
    def packed(self) -> int:
        """Rows of QKV's weight and columns of the output projection's, of all ranks together."""
        repeated = 2 * (self.groups - self.model.query_groups)
        return packed(self.cut) - repeated * self.cut.padded_channels

    @property
    def qkv_rows(self) -> int:
        """Rows of QKV's weight alone."""
        return self.packed - self.model.num_attention_heads * self.cut.padded_channels

    @cached_property
    def plan(self) -> Plan:
        """What moves over the dim axis; ``Plan("none")`` with one segment, which is stock."""
        layout = self.layout
        if self.cut.m == 1:
            return Plan(exchange="none", split="none")
        choice = Choice(
            exchange=layout.exchange or "auto",
            split=layout.split or "auto",
            # A forward pass alone gathers anew: only a training step knows when it is over.
            gather=layout.gather or "microbatch" if self.phase == "train" else "microbatch",
            gather_layers=layout.gather_layers if self.phase == "train" else None,
            chunks=layout.pp,
            microbatches=self.microbatches,
            training=self.phase == "train",
            core_attention=layout.core_attention or "spec",
            machine=self.machine,
        )
        if self.phase == "decode":
            return decode_plan(cache_split(choice, self.cut, layout.micro_batch))
        if self.batch.documents:
            known = choice, self.cut, self.block
            return packed_plan(*known, tokens=self.tokens, sequence_parallel=self.sequence_parallel)
        return resolve(
            choice,
            self.cut,
            self.block,
            sequence=self.sequence,
            batch=layout.micro_batch,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def packs_runs(self) -> bool:
        """Whether core attention runs on the pieces of packed documents."""
        return bool(self.batch.documents) and self.plan.split == "sequence"

"""What a machine can do: each constant with its unit, where it is from, and what of it is achieved.

A hardware file has a datasheet's figures and the fractions of them that programs get, or figures
that ``helix calibrate`` has measured, which are achieved as they stand.

A collective that is begun before its result is needed runs beside computation. How they get on is a
property of what moves (:data:`BESIDE`): the part that is hidden, and what computation loses by it.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels.core_times import CoreTime
from megatron_helix.machine.quantities import Capacity, Compute, Duration, Host, Link, MemoryRate
from megatron_helix.run_config.files import Config, read_config
from megatron_helix.run_config.precision import ELEMENT_BYTES, Precision

# Weights gathered for a GEMM beside one before it; gradients of weights on their way to who keeps
# them; a column linear's input and its gradient in the backward pass; gradients and weights of
# data-parallel replicas; keys and values in a ring, beside attention.
Beside = Literal["weights", "gradients", "tokens", "replicas", "keys"]
BESIDE = get_args(Beside)


class Overlap(Config):
    """How collectives of a kind and the computation beside them get on.

    Attributes:
        hidden: the part of what is sent that moves beside computation.
        slowed: the part of that time that computation takes longer.
        source: where that is from.
    """

    hidden: float = Field(ge=0, le=1)
    slowed: float = Field(default=0.0, ge=0, le=1)
    source: str = Field(min_length=1)


class Held(NamedTuple):
    """What collectives cost a rank, in seconds.

    Attributes:
        alone: with nothing beside them.
        hidden: of that.
        slowed: what computation beside them takes longer.
    """

    alone: float
    hidden: float = 0.0
    slowed: float = 0.0

    @property
    def lost(self) -> float:
        """What a step takes longer by them."""
        return self.alone - self.hidden + self.slowed


class Hardware(Config):
    """A machine of equal devices.

    Attributes:
        name: for tables.
        devices: in all.
        devices_per_node: that reach each other by ``intra_node`` links.
        gemm: dense matrix products in half precision (in single precision on a CPU).
        memory: of a device.
        memory_bandwidth: of a device.
        intra_node: links within a node.
        inter_node: links between nodes, one for each device; None where there is one node.
        fused_attention_max_channels: head dimension up to which attention keeps its scores on the
            chip; beyond it they go through memory.
        fused_attention: rate of those kernels in training, causal: operations of half the square of
            scores, a backward pass counted as two forward passes. None is that of ``gemm``.
        streaming: the part of ``memory_bandwidth``, which a copy gets, that kernels bound by memory
            get in the mean: norms, activations, softmax, optimizer.
        streaming_source: where that is from.
        gap: between two kernels of a rank.
        host: of its process: no step is shorter than that takes to start its kernels; None where
            nobody measured it, and on CPUs, which compute themselves.
        arrival: how much later the last rank comes to a collective than the others; whatever is
            begun early does not wait for it.
        beside: by what moves (:data:`BESIDE`) how collectives get on with the computation beside
            them; nothing is hidden of what is not there, as on CPUs, where nothing is begun early.
        core_attention: times of core attentions, for ``--helix-core-attention auto``.
        element_bytes: of weights and activations, in the precision that ``gemm`` is for.
        note: what else a reader must know.
    """

    name: str
    devices: PositiveInt
    devices_per_node: PositiveInt
    gemm: Compute
    memory: Capacity
    memory_bandwidth: MemoryRate
    intra_node: Link
    inter_node: Link | None = Field(default=None, validate_default=True)
    fused_attention_max_channels: PositiveInt = 256
    fused_attention: Compute | None = None
    streaming: float = Field(default=1.0, gt=0, le=1)
    streaming_source: str = ""
    gap: Duration | None = None
    host: Host | None = None
    arrival: Duration | None = None
    beside: dict[Beside, Overlap] = Field(default_factory=dict)
    core_attention: tuple[CoreTime, ...] = ()
    element_bytes: PositiveInt = 2
    note: str = ""

    @field_validator("inter_node")
    @classmethod
    def _linked(cls, link: Link | None, info: ValidationInfo) -> Link | None:
        known = info.data
        if link is None and known.get("devices", 1) > known.get("devices_per_node", 1):
            raise UserError("must be given where devices exceed devices_per_node")
        return link

    @property
    def precision(self) -> Precision:
        """What is planned for the machine: the precision that its figures are for."""
        return "fp32" if self.element_bytes == ELEMENT_BYTES["fp32"] else "fp16"

    def scaled(self, devices: int) -> "Hardware":
        """The same nodes and links, another number of devices.

        Raises:
            UserError: for more than one node has, where it has no links to another.
        """
        if self.inter_node is None and devices > self.devices_per_node:
            raise UserError(
                f"--devices: {self.name} has {self.devices_per_node} devices in its one node, got"
                f" {devices}; name a hardware file with inter_node"
            )
        name = self.name if devices == self.devices else f"{devices} devices of {self.name}"
        return Hardware.model_validate({**self.model_dump(), "devices": devices, "name": name})

    @property
    def streaming_rate(self) -> float:
        """Bytes a second of kernels bound by memory."""
        return self.memory_bandwidth.rate * self.streaming

    def seconds(
        self,
        kind: str,
        sent_bytes: float,
        calls: float,
        ranks: int,
        stride: int,
        *,
        ideal: bool = False,
    ) -> float:
        """Time of collectives by the alpha-beta model, of ranks that come to them together.

        A call takes a latency for every hop (:func:`hops`) and what it sends over the bandwidth:
        Chan et al., "Collective communication: theory, practice, and experience"
        (2007).
        Ranks on several nodes use a link between nodes each (:func:`crossing`).

        Args:
            kind: of collective.
            sent_bytes: by a rank, in all calls.
            calls: of it.
            ranks: p of a group.
            stride: distance of neighbours of the group in global ranks.
            ideal: at peak bandwidth and without latency: no program is faster.
        """
        if ranks == 1:
            return 0.0
        near = self.intra_node.of(kind)
        inside = sent_bytes / (near.bandwidth.peak if ideal else near.bandwidth.rate)
        latency = near.latency.rate
        if ranks * stride > self.devices_per_node and self.inter_node is not None:
            local = min(ranks, max(1, self.devices_per_node // stride))
            far = self.inter_node.of(kind)
            leaves = crossing(kind, ranks, local) * sent_bytes
            inside = max(inside, leaves / (far.bandwidth.peak if ideal else far.bandwidth.rate))
            latency = max(latency, far.latency.rate)
        return inside if ideal else inside + calls * latency * hops(kind, ranks)

    def held(
        self,
        kind: str,
        sent_bytes: float,
        calls: float,
        ranks: int,
        stride: int,
        *,
        beside: Beside | None = None,
        apart: bool = True,
    ) -> Held:
        """What collectives cost a rank: waiting for the last one, and what is not hidden.

        Args:
            kind: of collective; these as for :meth:`seconds`.
            sent_bytes: by a rank.
            calls: of it.
            ranks: of a group.
            stride: of its neighbours.
            beside: what moves beside computation, while ranks come together; None if the next
                operation waits for it.
            apart: whether ranks have computed long enough since they met last to come apart.
        """
        if ranks == 1:
            return Held(0.0)
        alone = self.seconds(kind, sent_bytes, calls, ranks, stride)
        if known := self.beside.get(beside) if beside else None:
            hidden = known.hidden * alone
            return Held(alone, hidden, known.slowed * hidden)
        waits = self.arrival.rate if self.arrival and apart else 0.0
        return Held(alone + calls * waits)


def hops(kind: str, ranks: int) -> int:
    """Latencies of a collective among p ranks: ``ceil(log2 p)``, an all-reduce twice that."""
    one = 1 if kind in ("send", "all_to_all") else math.ceil(math.log2(ranks))
    return 2 * one if kind == "all_reduce" else one


def crossing(kind: str, ranks: int, local: int) -> float:
    """The part of what a rank sends that its link between nodes carries.

    Of ``ranks``, ``local`` are in one node. A ring crosses a node's border with what one rank
    sends, over the links of all ``local``; in an all-to-all each sends what is for other nodes
    over its own.
    """
    return (ranks - local) / (ranks - 1) if kind == "all_to_all" else 1 / local


def load(path: Path) -> Hardware:
    """Read a hardware file.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    return read_config(Hardware, path)

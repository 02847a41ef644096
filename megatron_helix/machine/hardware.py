"""What a machine can do: each constant with its unit, where it is from, and what of it is achieved.

A hardware file has a datasheet's figures and the fractions of them that programs get, or figures
that ``helix calibrate`` has measured, which are achieved as they stand.
"""

import math
from functools import cached_property
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels.core_times import CoreTime
from megatron_helix.run_config.files import Config, read_config
from megatron_helix.run_config.precision import ELEMENT_BYTES, Precision

_SI = {
    "TFLOP/s": 1e12,
    "GFLOP/s": 1e9,
    "TB/s": 1e12,
    "GB/s": 1e9,
    "GB": 1e9,
    "GiB": 2.0**30,
    "us": 1e-6,
}
_UNITS = {
    "gemm": ("TFLOP/s", "GFLOP/s"),
    "memory": ("GB", "GiB"),
    "memory_bandwidth": ("TB/s", "GB/s"),
    "bandwidth": ("GB/s",),
    "latency": ("us",),
}


class Quantity(Config):
    """A constant of a machine.

    Attributes:
        value: in ``unit``.
        unit: of ``value``.
        source: datasheet, measurement or assumption.
        achieved: the fraction of it that programs get.
        achieved_source: where that is from.
    """

    value: float = Field(gt=0)
    unit: str
    source: str = Field(min_length=1)
    achieved: float = Field(default=1.0, gt=0, le=1)
    achieved_source: str = ""

    @cached_property
    def peak(self) -> float:
        """In units of one: FLOP/s, bytes/s, bytes, s."""
        return self.value * _SI[self.unit]

    @cached_property
    def rate(self) -> float:
        """What programs get of :attr:`peak`."""
        return self.peak * self.achieved


def _require_unit(name: str, quantity: Quantity) -> Quantity:
    if quantity.unit not in _UNITS[name]:
        raise UserError(f"unit must be one of {', '.join(_UNITS[name])}, got {quantity.unit!r}")
    return quantity


class Link(Config):
    """One level of links.

    Attributes:
        bandwidth: of one device, in one direction.
        latency: of one hop of a collective.
    """

    bandwidth: Quantity
    latency: Quantity

    @field_validator("bandwidth", "latency")
    @classmethod
    def _units(cls, quantity: Quantity, info: ValidationInfo) -> Quantity:
        return _require_unit(str(info.field_name), quantity)


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
        beside: the part of a collective's time that a GEMM beside it hides, once what the GEMM
            loses meanwhile is taken off: 0 where nothing is begun early, as on CPUs.
        beside_source: where that is from.
        core_attention: times of core attentions, for ``--helix-core-attention auto``.
        element_bytes: of weights and activations, in the precision that ``gemm`` is for.
        note: what else a reader must know.
    """

    name: str
    devices: PositiveInt
    devices_per_node: PositiveInt
    gemm: Quantity
    memory: Quantity
    memory_bandwidth: Quantity
    intra_node: Link
    inter_node: Link | None = Field(default=None, validate_default=True)
    fused_attention_max_channels: PositiveInt = 256
    beside: float = Field(default=0.0, ge=0, le=1)
    beside_source: str = ""
    core_attention: tuple[CoreTime, ...] = ()
    element_bytes: PositiveInt = 2
    note: str = ""

    @field_validator("gemm", "memory", "memory_bandwidth")
    @classmethod
    def _units(cls, quantity: Quantity, info: ValidationInfo) -> Quantity:
        return _require_unit(str(info.field_name), quantity)

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
        return Hardware.model_validate({**self.model_dump(), "devices": devices})

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
        """Time of collectives by the alpha-beta model.

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
        near = self.intra_node.bandwidth
        inside = sent_bytes / (near.peak if ideal else near.rate)
        latency = self.intra_node.latency.rate
        if ranks * stride > self.devices_per_node and self.inter_node is not None:
            local = min(ranks, max(1, self.devices_per_node // stride))
            far = self.inter_node.bandwidth
            leaves = crossing(kind, ranks, local) * sent_bytes
            inside = max(inside, leaves / (far.peak if ideal else far.rate))
            latency = max(latency, self.inter_node.latency.rate)
        if ideal:
            return inside
        return inside + calls * latency * hops(kind, ranks)


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

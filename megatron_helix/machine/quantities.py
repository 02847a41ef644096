"""Constants of a machine, each with its unit and its source."""

from functools import cached_property
from typing import Annotated

from pydantic import AfterValidator, Field

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.files import Config

_SI = {
    "TFLOP/s": 1e12,
    "GFLOP/s": 1e9,
    "TB/s": 1e12,
    "GB/s": 1e9,
    "GB": 1e9,
    "GiB": 2.0**30,
    "us": 1e-6,
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


def _measured_in(*units: str) -> AfterValidator:
    def check(quantity: Quantity) -> Quantity:
        if quantity.unit not in units:
            raise UserError(f"unit must be one of {', '.join(units)}, got {quantity.unit!r}")
        return quantity

    return AfterValidator(check)


Compute = Annotated[Quantity, _measured_in("TFLOP/s", "GFLOP/s")]
Capacity = Annotated[Quantity, _measured_in("GB", "GiB")]
MemoryRate = Annotated[Quantity, _measured_in("TB/s", "GB/s")]
LinkRate = Annotated[Quantity, _measured_in("GB/s")]
Duration = Annotated[Quantity, _measured_in("us")]


class Pace(Config):
    """Of a collective over links.

    Attributes:
        bandwidth: of one device, in one direction.
        latency: of one hop of a collective.
    """

    bandwidth: LinkRate
    latency: Duration


class Link(Pace):
    """One level of links.

    Attributes:
        kinds: of collectives whose pace was measured apart.
    """

    kinds: dict[str, Pace] = Field(default_factory=dict)

    def of(self, kind: str) -> Pace:
        """The pace of a kind of collective."""
        return self.kinds.get(kind, self)


class Host(Config):
    """What a process needs to start the kernels of a layer for one micro-batch.

    Attributes:
        forward: in a forward pass.
        backward: in a backward pass.
    """

    forward: Duration
    backward: Duration

"""What core attentions take, measured, and which of them is fastest for a shape.

``helix calibrate`` measures the times of a machine; :data:`MEASURED` are those of H200.
"""

import math
from collections.abc import Iterable, Sequence

from pydantic import Field, PositiveInt

from megatron_helix.run_config.files import Config


class CoreTime(Config):
    """One measurement of one core attention, causal, with as many query groups as heads.

    Attributes:
        core: a value of ``--helix-core-attention``.
        channels: head dimension.
        length: of a sequence, in tokens.
        rows: sequences times heads.
        forward_ms: time of a forward pass.
        training_ms: time of a forward and a backward pass.
        memory_gb: highest use of memory beside what goes in.
        source: card, software, date.
    """

    core: str
    channels: PositiveInt
    length: PositiveInt
    rows: PositiveInt
    forward_ms: float = Field(gt=0)
    training_ms: float = Field(gt=0)
    memory_gb: float = Field(ge=0)
    source: str = Field(min_length=1)


_H200 = "H200, bf16, torch 2.11, TransformerEngine 2.20.2, ffpa-attn 0.2.4, 2026-11"


def _on_h200(
    core: str, length: int, rows: int, forward: float, training: float, gb: float
) -> CoreTime:
    return CoreTime(
        core=core,
        channels=512,
        length=length,
        rows=rows,
        forward_ms=forward,
        training_ms=training,
        memory_gb=gb,
        source=_H200,
    )


# One call, a shape at a time on an idle GPU (benchmarks/results/one_h200_core.json), where the host
# counts too; ffpa in a call of its own on such a card, in which spec took 7.6 and 22.2 ms.
MEASURED = (
    _on_h200("spec", 512, 128, 1.02, 2.25, 0.40),
    _on_h200("prefix", 512, 128, 0.41, 1.61, 0.40),
    _on_h200("spec", 2048, 128, 3.57, 7.69, 3.76),
    _on_h200("prefix", 2048, 128, 1.79, 4.99, 1.88),
    _on_h200("ffpa", 2048, 128, 2.8, 11.1, 2.4),
    _on_h200("spec", 4096, 32, 4.06, 8.05, 3.49),
    _on_h200("prefix", 4096, 32, 2.04, 5.31, 1.28),
    _on_h200("spec", 8192, 16, 10.81, 22.56, 6.71),
    _on_h200("prefix", 8192, 16, 2.90, 10.34, 1.07),
    _on_h200("ffpa", 8192, 16, 2.9, 15.7, 1.2),
    _on_h200("spec", 16384, 16, 59.4, 148.7, 69.5),
    _on_h200("prefix", 16384, 16, 11.97, 40.1, 2.15),
)


def fastest(
    times: Sequence[CoreTime], cores: Iterable[str], *, channels: int, length: int, training: bool
) -> tuple[str, str]:
    """Which of ``cores`` takes least, and why, in words.

    Asked of the measured shape that is nearest: of that head dimension, else the next larger one,
    and of its lengths the one whose ratio to ``length`` is nearest to 1. Without one, or where the
    spec's own was not measured there, it is ``spec``. Of equal ones: ``spec``, else the first.

    Args:
        times: measured ones.
        cores: that can do what is asked.
        channels: head dimension.
        length: of a sequence.
        training: whether a backward pass follows.
    """
    # A kernel for a smaller head says nothing of a larger one, and a much larger one has others.
    wide = min((time.channels for time in times if time.channels >= channels), default=0)
    near = [time for time in times if time.channels == wide <= 1.25 * channels]
    lengths = {time.length for time in near if time.core == "spec"}
    if not lengths:
        return "spec", f"nothing was measured at {channels} channels"
    nearest = min(lengths, key=lambda each: abs(math.log(each / length)))
    allowed = {"spec", *cores}
    taken = {
        time.core: time.training_ms if training else time.forward_ms
        for time in near
        if time.length == nearest and time.core in allowed
    }
    best = min(taken, key=lambda core: (taken[core], core != "spec"))
    listed = ", ".join(f"{core} {ms:g} ms" for core, ms in sorted(taken.items()))
    passes = "forward and backward" if training else "forward"
    return best, f"measured at {wide} channels, length {nearest}, {passes}: {listed}"

"""How long a step takes: the slower of arithmetic and memory, plus what communication adds.

* A part of a micro-batch takes ``max(operations / GEMM rate, bytes / memory rate)``: the roofline
  of Williams, Waterman, Patterson (2009).
* A collective takes ``alpha`` a hop and ``bytes / beta``: :meth:`Hardware.seconds`. Of a
  micro-batch's collectives the fraction ``overlap`` is hidden behind its computation, as far as
  there is any.
* M micro-batches on p stages take ``(M + p - 1)`` times the slowest stage (1F1B: Narayanan et al.
  2021, section 2.2); forward alone fills and drains the same way.
* A micro-batch's gradients are added up in memory, and once a step come their collectives and the
  optimizer: :mod:`megatron_helix.planner.update`.

A rank's time is computation, communication and waiting (the pipeline's bubble, and slower stages).
TPOT is communication and waiting of a rank, mean over ranks, for as many tokens as the batch has
sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_helix.basics.errors import UserError
from megatron_helix.machine.hardware import Hardware
from megatron_helix.planner import flops, memory, traffic, update
from megatron_helix.planner.deployment import Deployment


class Term(NamedTuple):
    """One line of the sum, for a rank of the slowest stage and one step.

    Attributes:
        what: for a reader.
        bound: ``compute``, ``memory``, ``link``, ``waiting``; ``hidden`` is negative time.
        seconds: of a step.
        sent_bytes: by the rank, for links.
    """

    what: str
    bound: str
    seconds: float
    sent_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The least time of a step at the peak of each resource, for a rank of the slowest stage."""

    compute_s: float
    memory_s: float
    link_s: float

    @property
    def roofline_s(self) -> float:
        """The largest one: nothing that computes and moves as much is faster."""
        return max(self.compute_s, self.memory_s, self.link_s)

    @property
    def resource(self) -> str:
        """Which one that is."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "link": self.link_s}
        return max(times, key=times.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a deployment does on a machine; times are of one step, means over ranks where not said.

    Attributes:
        deployment: what runs.
        step_s: duration of a step.
        compute_s: outside collectives.
        communication_s: in collectives, and not hidden.
        waiting_s: for other ranks.
        memory: of the fullest rank.
        bounds: of the slowest stage.
        terms: the sum for a rank of the slowest stage.
    """

    deployment: Deployment
    step_s: float
    compute_s: float
    communication_s: float
    waiting_s: float
    memory: memory.Memory
    bounds: Bounds
    terms: tuple[Term, ...]

    @property
    def tokens_per_s(self) -> float:
        """TPS."""
        return self.deployment.step_tokens / self.step_s

    @property
    def tpot_ms(self) -> float:
        """TPOT: communication and waiting for ``batch`` tokens."""
        lost = self.communication_s + self.waiting_s
        return lost * self.deployment.batch.sequences / self.deployment.step_tokens * 1e3

    @property
    def roofline(self) -> float:
        """Fraction of the layout's own roofline that is reached."""
        return self.bounds.roofline_s / self.step_s


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One rank of a stage; times of all its micro-batches, and of what comes once a step."""

    terms: list[Term]
    compute_s: float
    exposed_s: float
    once_s: float
    update_s: float
    bounds: Bounds

    @property
    def busy_s(self) -> float:
        return self.compute_s + self.exposed_s


def predict(here: Deployment, machine: Hardware, *, overlap: float = 0.0) -> Prediction:
    """Time, memory and bounds of one step.

    Args:
        here: what runs; checked already.
        machine: what it runs on.
        overlap: fraction of a micro-batch's communication that computation may hide, 0 to 1.

    Raises:
        UserError: when the machine has another number of devices or figures for another precision,
            overlap is no fraction, or the machine has no kernel for attention over context-parallel
            ranks.
    """
    if here.world_size != machine.devices:
        raise UserError(
            f"devices: the layout is for {here.world_size} ranks, {machine.name} has"
            f" {machine.devices}; use as many"
        )
    if here.element_bytes != machine.element_bytes:
        raise UserError(
            f"precision: {here.precision} has elements of {here.element_bytes} bytes, and"
            f" {machine.name} has figures for {machine.element_bytes}; use another hardware file"
        )
    if not 0 <= overlap <= 1:
        raise UserError(f"overlap: must be between 0 and 1, got {overlap}; it is a fraction")
    require_kernels(here, machine)
    # All stages between the first and the last are alike.
    kinds = sorted({0, min(1, here.stages - 1), here.stages - 1})
    counts = [1] * len(kinds)
    if len(kinds) == 3:
        counts[1] = here.stages - 2
    stages = [_stage(here, stage, machine, overlap) for stage in kinds]
    slowest = max(stages, key=lambda stage: stage.busy_s)
    rounds = (here.microbatches + here.stages - 1) / here.microbatches
    once_s, update_s = max(s.once_s for s in stages), max(s.update_s for s in stages)
    step_s = rounds * slowest.busy_s + once_s + update_s

    def mean(values: list[float]) -> float:
        return sum(v * n for v, n in zip(values, counts, strict=True)) / here.stages

    compute_s = mean([s.compute_s + s.update_s for s in stages])
    communication_s = mean([s.exposed_s + s.once_s for s in stages])
    bubble = Term(what="bubble", bound="waiting", seconds=(rounds - 1) * slowest.busy_s)
    fused = machine.fused_attention_max_channels
    needs = [memory.of_rank(here, stage, fused_channels=fused) for stage in kinds]
    return Prediction(
        deployment=here,
        step_s=step_s,
        compute_s=compute_s,
        communication_s=communication_s,
        waiting_s=max(0.0, step_s - compute_s - communication_s),
        memory=max(needs, key=lambda need: need.total),
        bounds=slowest.bounds,
        terms=(*slowest.terms, *([bubble] if here.stages > 1 else [])),
    )


def require_kernels(here: Deployment, machine: Hardware) -> None:
    """Context parallelism runs in TransformerEngine's fused attention alone.

    Raises:
        UserError: naming the head dimension that it stops at.
    """
    most = machine.fused_attention_max_channels
    if here.layout.cp > 1 and here.model.kv_channels > most:
        raise UserError(
            f"cp: needs fused attention, which {machine.name} has for a kv_channels of at most"
            f" {most}, got {here.model.kv_channels}; use 1"
        )


def _stage(here: Deployment, stage: int, machine: Hardware, overlap: float) -> _Stage:
    passes = 3 if here.phase == "train" else 1
    times = here.microbatches * passes
    fused = machine.fused_attention_max_channels
    gemm, stream = machine.gemm, machine.memory_bandwidth
    work = flops.forward(here, stage, fused_channels=fused)
    terms = []
    for part in work:
        arithmetic, moving = part.flops / gemm.rate, part.memory_bytes / stream.rate
        bound = "compute" if arithmetic > moving else "memory"
        terms.append(Term(what=part.what, bound=bound, seconds=times * max(arithmetic, moving)))
    added = 0.0
    if here.phase == "train":
        each = update.accumulation_bytes(here, stage)
        added = here.microbatches * each
        seconds = added / stream.rate
        terms.append(Term(what="gradients added up", bound="memory", seconds=seconds))
    compute_s = sum(term.seconds for term in terms)
    exchanged = once_s = link_s = 0.0
    for moved in traffic.transfers(here, stage):
        known = (moved.kind, moved.sent_bytes, moved.calls, moved.ranks, moved.stride)
        seconds = machine.seconds(*known)
        terms.append(
            Term(
                what=f"{moved.what}: {moved.axis} {moved.kind}, {moved.when}",
                bound="link",
                seconds=seconds,
                sent_bytes=moved.sent_bytes,
            )
        )
        link_s += machine.seconds(*known, ideal=True)
        if moved.when == "step" and not moved.beside:
            once_s += seconds
        else:
            exchanged += seconds
    hidden = min(overlap * exchanged, compute_s)
    if hidden:
        terms.append(Term(what="hidden behind computation", bound="hidden", seconds=-hidden))
    update_s = updated = 0.0
    if here.phase == "train":
        updated = update.optimizer_bytes(here, stage)
        update_s = updated / stream.rate
        terms.append(Term(what="optimizer", bound="memory", seconds=update_s))
    moved_bytes = times * sum(part.memory_bytes for part in work) + added + updated
    bounds = Bounds(
        compute_s=times * sum(part.flops for part in work) / gemm.peak,
        memory_s=moved_bytes / stream.peak,
        link_s=link_s,
    )
    return _Stage(
        terms=terms,
        compute_s=compute_s,
        exposed_s=exchanged - hidden,
        once_s=once_s,
        update_s=update_s,
        bounds=bounds,
    )

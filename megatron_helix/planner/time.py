"""How long a step takes: the slower of arithmetic and memory, plus what communication adds.

* A part of a micro-batch takes ``max(operations / GEMM rate, bytes / memory rate)``: the roofline
  of Williams, Waterman, Patterson (2009). Fused attention has a rate of its own, and kernels that
  are bound by memory get a part of a copy's. Between two kernels of a layer lies a gap.
* A collective takes ``alpha`` a hop and ``bytes / beta``, and the wait for the rank that comes
  last. Of one that is begun early a part is hidden, and slows the computation beside it: both by
  what moves, :meth:`megatron_helix.machine.hardware.Hardware.held`.
* Where a process takes longer to start a micro-batch's kernels than the GPU for all of that, the
  GPU waits for it.
* M micro-batches on p stages take ``(M + p - 1)`` times the slowest stage (1F1B: Narayanan et al.
  2021, section 2.2); forward alone fills and drains the same way.
* A micro-batch's gradients are added up in memory, and once a step come their collectives and the
  optimizer: :mod:`megatron_helix.planner.update`.

A rank's time is computation, communication and waiting (the pipeline's bubble, and slower stages);
where nothing follows a forward pass, a stage that is through waits for nobody: it is idle.
TPOT is communication and waiting of a rank, mean over ranks, for as many tokens as the batch has
sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.cost import KERNELS
from megatron_helix.machine.hardware import Hardware
from megatron_helix.planner import flops, memory, traffic, update
from megatron_helix.planner.deployment import Deployment

# Of a layer and a round of the ring of context parallelism: attention once more, its parts merged
# and added up (counted in TransformerEngine 2.20.2, AttnFuncWithCPAndKVP2P).
RING_KERNELS = {"forward": 17, "backward": 25}


class Term(NamedTuple):
    """One line of the sum, for a rank of the slowest stage and one step.

    Attributes:
        what: for a reader.
        bound: ``compute``, ``memory``, ``link``, ``launch`` (gaps between kernels), ``waiting``;
            ``hidden`` is negative time.
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
        idle_s: behind a stage's last micro-batch, where nobody is waited for.
        memory: of the fullest rank.
        bounds: of the slowest stage.
        terms: the sum for a rank of the slowest stage.
    """

    deployment: Deployment
    step_s: float
    compute_s: float
    communication_s: float
    waiting_s: float
    idle_s: float
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


def predict(here: Deployment, machine: Hardware) -> Prediction:
    """Time, memory and bounds of one step.

    Args:
        here: what runs; checked already.
        machine: what it runs on.

    Raises:
        UserError: when the machine has another number of devices or figures for another precision,
            or no kernel for attention over context-parallel ranks.
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
    require_kernels(here, machine)
    # All stages between the first and the last are alike.
    kinds = sorted({0, min(1, here.stages - 1), here.stages - 1})
    counts = [1] * len(kinds)
    if len(kinds) == 3:
        counts[1] = here.stages - 2
    stages = [_stage(here, stage, machine) for stage in kinds]
    slowest = max(stages, key=lambda stage: stage.busy_s)
    rounds = (here.microbatches + here.stages - 1) / here.microbatches
    once_s, update_s = max(s.once_s for s in stages), max(s.update_s for s in stages)
    step_s = rounds * slowest.busy_s + once_s + update_s

    def mean(values: list[float]) -> float:
        return sum(v * n for v, n in zip(values, counts, strict=True)) / here.stages

    compute_s = mean([s.compute_s + s.update_s for s in stages])
    communication_s = mean([s.exposed_s + s.once_s for s in stages])
    lost_s = max(0.0, step_s - compute_s - communication_s)
    # Stage by stage the first micro-batch comes later, and the last one leaves earlier.
    idle_s = 0.0 if here.phase == "train" else min(lost_s, (rounds - 1) * slowest.busy_s / 2)
    bubble = Term(what="bubble", bound="waiting", seconds=(rounds - 1) * slowest.busy_s)
    fused = machine.fused_attention_max_channels
    needs = [memory.of_rank(here, stage, fused_channels=fused) for stage in kinds]
    return Prediction(
        deployment=here,
        step_s=step_s,
        compute_s=compute_s,
        communication_s=communication_s,
        waiting_s=lost_s - idle_s,
        idle_s=idle_s,
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


def _stage(here: Deployment, stage: int, machine: Hardware) -> _Stage:
    train = here.phase == "train"
    M = here.microbatches
    passes = {"forward": M, "backward": M if train else 0}
    fused = machine.fused_attention_max_channels
    gemm, stream = machine.gemm, machine.memory_bandwidth
    work = flops.forward(here, stage, fused_channels=fused)
    terms, moved_bytes, times = [], 0.0, M * (3 if train else 1)
    for part in work:
        moved = part.moved(**passes)
        moved_bytes += moved
        rate = (machine.fused_attention or gemm).rate if part.fused else gemm.rate
        arithmetic = times * part.flops / rate
        moving = moved / (machine.streaming_rate if part.streams else stream.rate)
        bound = "compute" if arithmetic > moving else "memory"
        terms.append(Term(what=part.what, bound=bound, seconds=max(arithmetic, moving)))
    if train:
        added = M * update.accumulation_bytes(here, stage)
        moved_bytes += added
        seconds = added / machine.streaming_rate
        terms.append(Term(what="gradients added up", bound="memory", seconds=seconds))
    if machine.gap:
        rounds = here.layout.cp - 1 if here.layout.cp_comm_type in (None, "p2p") else 0
        of_layer = {each: KERNELS[each] + rounds * RING_KERNELS[each] for each in passes}
        count = here.layers * sum(of_layer[each] * passes[each] for each in passes)
        terms.append(Term(what="between kernels", bound="launch", seconds=count * machine.gap.rate))
    compute_s = sum(term.seconds for term in terms)
    exchanged = hidden = slowed = once_s = link_s = 0.0
    for moved in traffic.transfers(here, stage):
        known = (moved.kind, moved.sent_bytes, moved.calls, moved.ranks, moved.stride)
        held = machine.held(*known, beside=moved.beside, apart=here.phase != "decode")
        terms.append(
            Term(
                what=f"{moved.what}: {moved.axis} {moved.kind}, {moved.when}",
                bound="link",
                seconds=held.alone,
                sent_bytes=moved.sent_bytes,
            )
        )
        link_s += machine.seconds(*known, ideal=True)
        if moved.when == "step" and not moved.beside:
            once_s += held.alone
        else:
            exchanged += held.alone
            hidden += held.hidden
            slowed += held.slowed
    if hidden:
        fits = min(1.0, compute_s / hidden)  # no more than there is to hide behind
        hidden, slowed = hidden * fits, slowed * fits
        terms.append(Term(what="hidden behind computation", bound="hidden", seconds=-hidden))
        terms.append(Term(what="computation slowed by it", bound="compute", seconds=slowed))
    compute_s += slowed
    if machine.host:
        starts = {"forward": machine.host.forward.rate, "backward": machine.host.backward.rate}
        started_s = here.layers * sum(starts[each] * passes[each] for each in passes)
        if (late_s := started_s - compute_s - exchanged + hidden) > 0:
            terms.append(Term(what="processes start kernels", bound="launch", seconds=late_s))
            compute_s += late_s
    update_s = 0.0
    if train:
        updated = update.optimizer_bytes(here, stage)
        moved_bytes += updated
        update_s = updated / machine.streaming_rate
        terms.append(Term(what="optimizer", bound="memory", seconds=update_s))
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

"""Every layout that fits in memory, ranked.

One that would fit if it kept the gathered weights of fewer layers is tried with as many as fit.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import EXCHANGES
from megatron_helix.machine.hardware import Hardware
from megatron_helix.planner import accuracy
from megatron_helix.planner.deployment import (
    Deployment,
    require_length,
    require_phase,
)
from megatron_helix.planner.sizes import layout_of
from megatron_helix.planner.time import Prediction, predict, require_kernels
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.precision import Precision

RANKINGS = tuple(accuracy.RANKINGS)
MOST_WASTE = 1 / 8  # of the weights of attention, or of MLPs: what needs more padding is left out
MICRO_BATCH_STEP = 3  # of powers of two every third: a factor of 8 between sizes that are tried


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search saw.

    Attributes:
        ranked: what fits, best first.
        too_large: layouts that need more memory than a device has.
    """

    ranked: list[Prediction]
    too_large: int

    def cuts(self) -> list[Prediction]:
        """The best micro-batch of each way to cut the model, best first."""
        best: dict[tuple, Prediction] = {}
        for one in self.ranked:
            best.setdefault(_cut(one), one)
        return list(best.values())


def search(
    model: ModelConfig,
    machine: Hardware,
    batch: BatchConfig,
    *,
    phase: str = "train",
    rank_by: str = "tps",
    precision: Precision | None = None,
    gradient_flags: GradientFlags = GradientFlags(),
) -> Found:
    """Predict every layout on all devices of ``machine``; ``precision`` if not the machine's.

    Raises:
        UserError: when no layout can run, or none fits in memory; says which is nearest.
    """
    if rank_by not in RANKINGS:
        raise UserError(f"rank-by: must be one of {', '.join(RANKINGS)}, got {rank_by!r}")
    fit, too_large = [], []
    require_phase(phase)
    require_length(model, batch)
    for here in deployments(model, machine, batch, phase, precision, gradient_flags):
        predicted = predict(here, machine)
        if not _fits_in(machine, predicted):
            predicted = _with_fewer_kept(here, machine) or predicted
        (fit if _fits_in(machine, predicted) else too_large).append(predicted)
    if not fit and not too_large:
        raise UserError(
            f"no layout of {model.name} runs on {machine.devices} devices with"
            f" {batch.sequences} sequences of {batch.sequence_length} tokens; change --batch"
            " or --seq to multiples of the number of devices"
        )
    if not fit:
        nearest = min(too_large, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout of {model.name} fits in {machine.memory.rate / 1e9:.0f} GB a device: the"
            f" smallest, {nearest.deployment.layout.name}, needs"
            f" {nearest.memory.total / 1e9:.0f} GB; use more devices, or a smaller --batch"
        )
    return Found(ranked=sorted(fit, key=_key(rank_by)), too_large=len(too_large))


def _fits_in(machine: Hardware, one: Prediction) -> bool:
    return one.memory.total <= machine.memory.rate


def _with_fewer_kept(here: Deployment, machine: Hardware) -> Prediction | None:
    """A layout too large, with the gathered weights of as many layers kept as there is room for."""
    found = None
    some, all_ = 0, here.kept_layers
    while all_ - some > 1:
        layers = (some + all_) // 2
        keys: dict[str, Any] = {"gather_layers": layers}
        keys["name"] = name({**here.layout.model_dump(), **keys})
        layout = here.layout.model_copy(update=keys)
        one = predict(replace(here, layout=layout), machine)
        if _fits_in(machine, one):
            some, found = layers, one
        else:
            all_ = layers
    return found


def _key(rank_by: str) -> Callable[[Prediction], tuple[float, float]]:
    return {
        "tps": lambda one: (-one.tokens_per_s, one.memory.total),
        "tpot": lambda one: (one.tpot_ms, -one.tokens_per_s),
        "memory": lambda one: (one.memory.total, -one.tokens_per_s),
    }[rank_by]


def deployments(
    model: ModelConfig,
    machine: Hardware,
    batch: BatchConfig,
    phase: str,
    precision: Precision | None = None,
    gradient_flags: GradientFlags = GradientFlags(),
) -> Iterator[Deployment]:
    """Every layout that can run on the devices of a machine, whether it fits in memory or not."""
    precision = precision or machine.precision
    devices = machine.devices
    for cut in _cuts(model, devices, phase):
        tp = cut.get("tp") or cut["m"] * cut["n"]
        for pp in _divisors(math.gcd(model.num_layers, devices // tp)):
            rest = devices // (tp * pp)
            if devices % (tp * pp):
                continue
            for beside in _beside(model, cut, rest, devices // pp, tp, phase):
                share = rest // beside.get("cp", 1)
                if batch.sequences % share:
                    continue
                for micro_batch in _micro_batches(batch.sequences // share):
                    keys = {**cut, **beside, "pp": pp, "micro_batch": micro_batch}
                    optimizes = phase == "train" and rest > 1
                    keys["distributed_optimizer"] = optimizes and "fsdp" not in keys
                    try:
                        layout = LayoutConfig(name=name(keys), **keys)
                        known = phase, precision, machine
                        here = Deployment(
                            model, layout, batch, devices, *known, gradient_flags=gradient_flags
                        )
                        here.check()
                        require_kernels(here, machine)
                    except (UserError, ValidationError):  # the layout in itself
                        continue
                    if here.waste.mlp <= MOST_WASTE:
                        yield here


def _cuts(model: ModelConfig, devices: int, phase: str) -> Iterator[dict]:
    """Stock tensor parallelism, and every m x n with what may move."""
    heads = math.gcd(model.num_attention_heads, model.query_groups)
    for tp in _divisors(devices):
        if heads % tp == 0:
            yield {"tp": tp}
            if model.ffn_hidden_size % tp:  # where it is shared by tp, stock refuses
                yield {"m": 1, "n": tp}
        elif model.num_attention_heads % tp == tp % model.query_groups == 0:
            yield {"tp": tp}  # groups repeated
        for n in _divisors(math.gcd(tp, heads)):
            m = tp // n
            if m == 1 or not _fits(model, m, n):
                continue
            yield {"m": m, "n": n, "exchange": "activations"}
            if phase != "decode":
                yield {"m": m, "n": n, "exchange": "weights"}
            if phase == "train":
                for gather in ("once", "step"):
                    yield {"m": m, "n": n, "exchange": "weights", "gather": gather}


def _fits(model: ModelConfig, m: int, n: int) -> bool:
    """Whether a head has m segments that little padding makes alike."""
    try:
        cut = layout_of(model, m, n)
    except UserError:
        return False
    return cut.waste <= MOST_WASTE


def _beside(
    model: ModelConfig, cut: dict, rest: int, stage_ranks: int, tp: int, phase: str
) -> Iterator[dict]:
    """What may stand next to a cut, on the ``rest`` of the ranks: CP, GTP, FSDP; experts' own."""
    if model.num_experts:
        for ep in _divisors(math.gcd(model.num_experts, stage_ranks)):
            for etp in sorted({1, tp}):
                if stage_ranks % (ep * etp) == 0:
                    yield {"ep": ep, "etp": etp}
        return
    yield {}
    if "tp" in cut and phase != "decode":
        if rest > 1:
            yield {"fsdp": "megatron_fsdp"}
            yield {"fsdp": "torch_fsdp2"}
        for size in _divisors(rest):
            if size > 1:
                yield {"gtp": size}
                yield {"cp": size}
                yield {"cp": size, "cp_comm_type": "a2a"}
                yield {"cp": size, "cp_comm_type": "all_gather"}


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _micro_batches(sequences: int) -> list[int]:
    """Some powers of two, with the smallest and the largest that can be."""
    sizes = _divisors(math.gcd(sequences, 2**30))
    return sorted({sizes[0], *sizes[::-MICRO_BATCH_STEP]})


def name(keys: dict) -> str:
    """A layout in one word: what differs from the default."""
    tp = keys.get("tp")
    words = [f"tp{tp}"] if tp else [f"helix_{keys['m']}x{keys['n']}"]
    if keys.get("exchange"):
        words.append(keys["exchange"])
    if (gather := keys.get("gather")) and gather != "microbatch":
        words.append(f"{gather}{keys.get('gather_layers') or ''}")
    words += [keys["fsdp"]] if keys.get("fsdp") else []
    for key in ("pp", "cp", "gtp", "ep", "etp"):
        words += [f"{key}{keys[key]}"] if keys.get(key, 1) > 1 else []
        words += [keys["cp_comm_type"]] if key == "cp" and keys.get("cp_comm_type") else []
    return "_".join([*words, f"mb{keys['micro_batch']}"])


_NAMED = re.compile(
    r"(?:tp(?P<tp>\d+)|helix_(?P<m>\d+)x(?P<n>\d+))"
    rf"(?:_(?P<exchange>{'|'.join(EXCHANGES)}))?(?:_(?P<gather>once|step)(?P<gather_layers>\d+)?)?"
    r"(?:_(?P<fsdp>megatron_fsdp|torch_fsdp2))?(?:_pp(?P<pp>\d+))?"
    r"(?:_cp(?P<cp>\d+)(?:_(?P<cp_comm_type>p2p|a2a|all_gather))?)?(?:_gtp(?P<gtp>\d+))?(?:_ep(?P<ep>\d+))?(?:_etp(?P<etp>\d+))?"
    r"_mb(?P<micro_batch>\d+)"
)


def named(word: str) -> dict[str, str]:
    """The keys that :func:`name` made a word of; empty when it did not make it."""
    found = _NAMED.fullmatch(word)
    return {key: value for key, value in found.groupdict().items() if value} if found else {}


def _cut(one: Prediction) -> tuple:
    """What makes two layouts different cuts, and not the same with another micro-batch."""
    cut = {"name", "split", "gather", "gather_layers", "micro_batch"}
    cut |= {"distributed_optimizer", "overlap_dp"}
    return tuple(one.deployment.layout.model_dump(exclude=cut).values())

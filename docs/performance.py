"""Writes the figures of docs/performance.md: ``python docs/performance.py``.

A test compares: the page cannot say another thing than the planner does. What stands outside the
marks is written by hand and kept. A measurement goes into ``benchmarks/results/few_gpus.json``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from marked import ROOT, filled, stored, table

from megatron_helix.experiment import config
from megatron_helix.machine import hardware
from megatron_helix.planner import flops
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.search import name, named
from megatron_helix.planner.time import Prediction, predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

PAGE = ROOT / "docs" / "performance.md"

EXPERIMENT = config.load(ROOT / "configs" / "experiments" / "seed_16gpu.yaml")
MACHINES = {
    name: hardware.load(ROOT / "configs" / "hardware" / f"{name}.yaml")
    for name in ("h100_nvl16", "h100_2x8_ib", "h100_2", "h200_2", "h200_4", "h200_8")
}
SIXTEEN = ("h100_nvl16", "h100_2x8_ib")
SOURCE = [model.name for model in EXPERIMENT.models]
MODELS = {model.name: model for model in EXPERIMENT.models}
# Adam's states of the source's MoE model need four GPUs: for two, experts of a quarter.
MODELS["moe_8192"] = MODELS["moe"].model_copy(update={"name": "moe_8192", "ffn_hidden_size": 8192})
Keys = Mapping[str, Any]
BASELINE, CUT, REPLICAS, ALONE = {"tp": 8, "pp": 2}, {"m": 4, "n": 4}, {"tp": 4}, {"tp": 1}
CUTS = [{"m": m, "n": 16 // m} for m in (2, 4, 8, 16)]
SEQUENCES, LENGTH = EXPERIMENT.batch.sequences, EXPERIMENT.batch.sequence_length
LENGTHS = (512, LENGTH, 8192)
# At least four micro-batches a step: fewer would leave the baseline's two stages to wait.
SIZES = tuple(2**power for power in range(9))

FEW_SEQUENCES = {1: 4, 2: 16, 4: 32}  # of a step, by GPUs

# By model and phase, GPUs and layout.
MEASURED_MS: dict[tuple[str, str], dict[tuple[int, str], float]] = {
    (model, phase): {
        (int(gpus), layout): ms for gpus, row in of_phase.items() for layout, ms in row.items()
    }
    for model, phases in stored("few_gpus")["steps"].items()
    for phase, of_phase in phases.items()
}


@dataclass(frozen=True)
class Case:
    """A model on a machine, in a phase, with a batch."""

    model: str
    machine: str
    phase: str
    length: int = LENGTH
    sequences: int = SEQUENCES
    devices: int = EXPERIMENT.world_size

    def one(self, micro_batch: int, layout: Keys) -> Prediction | None:
        """A layout at one micro-batch; None where it cannot run or does not fit."""
        return _one(self, micro_batch, tuple(sorted(layout.items())))

    def sizes(self, layout: Keys) -> list[Prediction]:
        """A layout at every micro-batch that can run and fits."""
        return [one for size in SIZES if (one := self.one(size, layout))]

    def best(self, *layouts: Keys) -> Prediction:
        """The fastest of some layouts, each at its own best micro-batch."""
        found = [one for layout in layouts for one in self.sizes(layout)]
        return max(found, key=lambda one: one.tokens_per_s)

    def helix(self, *cuts: Keys) -> list[Keys]:
        """Cuts with every exchange; weights gathered for a step only where it trains."""
        ways: list[Keys] = [{"exchange": "activations"}, {"exchange": "weights"}]
        if self.phase == "train":
            ways.append({"exchange": "weights", "gather": "step"})
        return [{**cut, **way} for cut in cuts for way in ways]


@cache
def _one(case: Case, micro_batch: int, items: tuple[tuple[str, Any], ...]) -> Prediction | None:
    model, machine = MODELS[case.model], MACHINES[case.machine].scaled(case.devices)
    keys = dict(items)
    shared = (keys.get("tp") or keys["m"] * keys["n"]) * keys.get("pp", 1) < case.devices
    experts = min(8, case.devices // keys.get("pp", 1)) if model.num_experts else 1
    keys |= {"micro_batch": micro_batch, "ep": experts}
    keys["distributed_optimizer"] = shared and case.phase == "train"
    layout = LayoutConfig(name=name(keys), **keys)
    batch = BatchConfig(sequences=case.sequences, sequence_length=case.length)
    try:
        here = Deployment(model, layout, batch, case.devices, case.phase).check()
    except ValueError:
        return None
    found = predict(here, machine)
    return found if found.memory.total <= machine.memory.rate else None


def wanted(model: str) -> tuple[float, float]:
    """Claimed changes of TPS and TPOT."""
    old, new = (one for one in EXPERIMENT.claims if one.model == model)
    return new.tokens_per_s / old.tokens_per_s - 1, new.tpot_ms / old.tpot_ms - 1


def reached(one: Prediction, base: Prediction) -> tuple[bool, bool]:
    """Whether a prediction's TPS and TPOT are as far from a baseline's as is claimed."""
    speed, lost = wanted(one.deployment.model.name)
    faster = one.tokens_per_s >= base.tokens_per_s * (1 + speed)
    return faster, one.tpot_ms <= base.tpot_ms * (1 + lost)


def source_table(phase: str) -> list[str]:
    """The source's table: each layout at its best micro-batch."""
    rows = []
    for model in SOURCE:
        for claim in EXPERIMENT.claims:
            if (claim.model, claim.phase) == (model, phase):
                figures = [f"{claim.tokens_per_s:,.0f}", "", f"{claim.tpot_ms:.2f}", "", "", ""]
                if claim.layout != "tp8_pp2":
                    figures[1], figures[3] = (f"{change:+.1%}" for change in wanted(model))
                rows.append([model, "*claimed*", claim.layout, *figures])
        for machine in SIXTEEN:
            case = Case(model, machine, phase)
            base = case.best(BASELINE)
            rows.append(_row(base, machine, base))
            rows += [
                _row(one, machine, base)
                for one in (
                    case.best(*case.helix(CUT)),
                    case.best(*case.helix(*CUTS)),
                    case.best(REPLICAS),
                    case.best(ALONE),
                )
            ]
    return table("model, machine, layout | TPS, change, TPOT, change, GB, as claimed", rows)


def _row(one: Prediction, machine: str, base: Prediction) -> list[str]:
    here = one.deployment
    changes = ["", "", ""]
    if one is not base:
        changes[0] = f"{one.tokens_per_s / base.tokens_per_s - 1:+.1%}"
        changes[1] = f"{one.tpot_ms / base.tpot_ms - 1:+.1%}"
        faster, less = reached(one, base)
        changes[2] = "both" if faster and less else "TPS" if faster else "TPOT" if less else "no"
    figures = [f"{one.tokens_per_s:,.0f}", changes[0], f"{one.tpot_ms:.3f}", changes[1]]
    size = f"{one.memory.total / 1e9:.1f}"
    return [here.model.name, machine, here.layout.name, *figures, size, changes[2]]


def replicas_ahead() -> str:
    """Where TP=4, DP=4 beats the baseline and helix, each at its best micro-batch."""
    cases = [
        Case(model, machine, phase)
        for model in SOURCE
        for phase in ("prefill", "train")
        for machine in SIXTEEN
    ]

    def ahead(rivals: Callable[[Case], list[Keys]]) -> str:
        won = []
        for case in cases:
            one, others = case.best(REPLICAS), [case.best(BASELINE), case.best(*rivals(case))]
            if all(
                one.tokens_per_s > other.tokens_per_s and one.tpot_ms < other.tpot_ms
                for other in others
            ):
                won.append(f"{case.model} {case.phase} on {case.machine}")
        return f"{len(won)} of {len(cases)} cases ({', '.join(won)})"

    return (
        "TP=4 x DP=4 is ahead of TP=8, PP=2 and of helix 4x4 in TPS and in TPOT in"
        f" {ahead(lambda case: case.helix(CUT))}; of TP=8, PP=2 and helix's best cut in"
        f" {ahead(lambda case: case.helix(*CUTS))}."
    )


def arithmetic() -> list[str]:
    """What is left of the claimed time to compute in, and the rate that takes."""
    rows = []
    peak = MACHINES[SIXTEEN[0]].gemm.peak
    for claim in EXPERIMENT.claims:
        model = MODELS[claim.model]
        for routed in (2, 1) if model.num_experts else (0,):
            shape = model.model_copy(update={"moe_router_topk": routed or 1})
            time_ms = SEQUENCES / claim.tokens_per_s * 1e3
            left = time_ms - claim.tpot_ms
            work = flops.of_model(shape, tokens=SEQUENCES, words=0, keys=LENGTH / 2)
            rate = work / EXPERIMENT.world_size / left * 1e3
            said = claim.model + (f", top-{routed}" if routed else "")
            times = [f"{time_ms:.3f}", f"{claim.tpot_ms:.2f}", f"{left:.3f}"]
            rows.append([said, claim.layout, *times, f"{rate / 1e12:,.0f}", f"{rate / peak:.0%}"])
    return table("model, layout | time, TPOT, left, TFLOP/s, of peak", rows)


def _smallest(case: Case, layout: Keys, *, same: bool) -> str:
    """The fewest tokens of a micro-batch that reach the claim, over all lengths."""
    found = []
    for length in LENGTHS:
        there = replace(case, length=length)
        for one in there.sizes(layout):
            size = one.deployment.layout.micro_batch
            base = there.one(size, BASELINE) if same else there.best(BASELINE)
            if base and all(reached(one, base)):
                found.append((size * length, size, length))
    return "{:,} ({} x {})".format(*min(found)) if found else "-"


def where() -> Iterator[str]:
    """Which layouts reach the claimed changes, and from how many tokens a micro-batch on."""
    rows, every = [], 0
    for model in SOURCE:
        for machine in SIXTEEN:
            case = Case(model, machine, "prefill")
            for layout in [*case.helix(*CUTS), REPLICAS]:
                every += 1
                cells = [_smallest(case, layout, same=same) for same in (True, False)]
                if set(cells) != {"-"}:
                    said = name({**layout, "micro_batch": 0}).removesuffix("_mb0")
                    rows.append([model, machine, said, *cells])
    yield from table("model, machine, layout | same, best", rows)
    yield (
        f"Of {every} combinations of model, machine and layout (helix 2x8, 4x4, 8x2, 16x1 by either"
        f" exchange; tp4) the {every - len(rows)} that are not listed reach them nowhere."
    )
    yield ""


def few_gpus() -> list[str]:
    """Whatever was measured on a few GPUs, with factors to stock, beside its prediction."""
    rows = []
    for (model, phase), measured in MEASURED_MS.items():
        for (gpus, said), ms in measured.items():
            keys = {key: value for key, value in named(said).items() if key != "micro_batch"}
            numbers = {key: int(value) if value.isdigit() else value for key, value in keys.items()}
            on_h100 = gpus == 1 or (gpus == 2 and (model, phase) != ("dense", "train"))
            machine = "h200_4" if gpus == 4 else "h100_2" if on_h100 else "h200_2"
            loop = "train" if phase == "train" else "forward"
            case = Case(model, machine, loop, sequences=FEW_SEQUENCES[gpus], devices=gpus)
            found = case.one(int(named(said)["micro_batch"]), numbers)
            if not found or found.deployment.layout.name != said:
                raise ValueError(f"MEASURED_MS: {model} cannot {phase} by {said} on {gpus} GPUs")
            beside = {name: each for (count, name), each in measured.items() if count == gpus > 1}
            factors = [
                next((f"{each / ms:.2f}" for name, each in beside.items() if stock in name), "")
                for stock in ("_pp", f"tp{gpus}_")
            ]
            error = f"{found.step_s * 1e3 / ms - 1:+.1%}"
            figures = [f"{ms:.1f}", *factors, f"{found.step_s * 1e3:.1f}", error]
            figures += [f"{found.tpot_ms:.3f}", f"{found.memory.total / 1e9:.1f}"]
            rows.append([model, phase, str(gpus), said, *figures])
    heads = "model, phase, GPUs, layout | measured, of PP, of TP, predicted, error, TPOT, GB"
    return table(heads, rows)


def eight_gpus() -> list[str]:
    """Helix at its best cut and exchange on 8 GPUs against the analogue of the source's baseline.

    Each at its best micro-batch: of all, and of those that cut the batch into at most four.
    """
    cuts = [{"m": m, "n": 8 // m} for m in (2, 4, 8)]
    rows = []
    for sequences, model, phase in product((64, 512), SOURCE, ("prefill", "train")):
        case = Case(model, "h200_8", phase, sequences=sequences, devices=8)
        ways = case.helix(*cuts)
        base, helix, tp = (case.best(*each) for each in ([{"tp": 4, "pp": 2}], ways, [{"tp": 8}]))
        row = [model, phase, str(sequences), helix.deployment.layout.name]
        row += [f"{one.step_s / helix.step_s:.2f}" for one in (base, tp)]
        row.append(f"{helix.tpot_ms / base.tpot_ms:.2f}")
        few = [
            [one for way in group for one in case.sizes(way) if one.deployment.microbatches <= 4]
            for group in ([{"tp": 4, "pp": 2}], ways)
        ]
        if all(few):
            base, helix = (min(group, key=lambda one: one.step_s) for group in few)
            row.append(f"{base.step_s / helix.step_s:.2f}")
            row.append(f"{helix.tpot_ms / base.tpot_ms:.2f}")
        else:
            row += ["does not fit", ""]
        rows.append(row)
    heads = "model, phase, batch, helix | TPS, TPS of TP=8, TPOT"
    return table(f"{heads}, TPS in 4, TPOT in 4", rows)


def ceiling() -> str:
    """What the arithmetic of the GPUs allows at its peak."""
    gemm = MACHINES[SIXTEEN[0]].gemm
    each = flops.of_model(MODELS["dense"], tokens=1, words=0, keys=LENGTH / 2)
    most = gemm.peak * EXPERIMENT.world_size / each
    return (
        f"At the peak of their arithmetic 16 H100 run the dense model forward at {most:,.0f}"
        f" tokens/s and train it at {most / 3:,.0f}."
    )


def claims() -> str:
    """The claimed changes."""
    changes = [f"{change:+.1%}" for model in SOURCE for change in wanted(model)]
    return "Dense: TPS {}, TPOT {}. MoE: TPS {}, TPOT {}.".format(*changes)


def sums() -> list[str]:
    """Of the rivals' cell with a model of today's shape: what the precision of gradients changes.

    Each layout as it was measured, and predicted with gradients in bf16 and in fp32. GB are those
    of the measurement, thousands of MiB.
    """
    cell = next(
        one for one in stored("two_h200_rivals")["cells"] if one["name"].startswith("qwen, a step")
    )
    model, batch = ModelConfig(**cell["model"]), BatchConfig(**cell["batch"])
    told = (
        GradientFlags(grad_reduce_in_bf16=True, megatron_fsdp_main_grads_dtype="bf16"),
        GradientFlags(megatron_fsdp_main_grads_dtype="fp32"),
    )
    rows = []
    for row in cell["rows"]:
        layout = LayoutConfig(name=name({"gather": None, **row["layout"]}), **row["layout"])
        figures = [f"{row['memory_mib'] / 1e3:.1f}", f"{row['step_ms']:.1f}"]
        for flags in told:
            known = (model, layout, batch, 2, "train", "bf16", MACHINES["h200_2"])
            one = predict(Deployment(*known, gradient_flags=flags).check(), MACHINES["h200_2"])
            figures += [f"{one.memory.total / 2**20 / 1e3:.1f}", f"{one.step_s * 1e3:.1f}"]
        rows.append([layout.name, *figures])
    return table("layout | GB, ms, GB in bf16, ms in bf16, GB in fp32, ms in fp32", rows)


PARTS: dict[str, Callable[[], list[str]]] = {
    "prefill": lambda: source_table("prefill"),
    "training": lambda: [ceiling(), "", *source_table("train"), replicas_ahead(), ""],
    "arithmetic": arithmetic,
    "where": lambda: [claims(), "", *where()],
    "few": few_gpus,
    "sums": sums,
    "eight": eight_gpus,
}


def page(text: str) -> str:
    """The page with its figures made anew."""
    return filled(text, "figures", PARTS)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

"""Writes the two tables of figures in README.md from what is stored: ``python docs/readme.py``.

A test compares. Every ratio and percentage in them is computed of ``benchmarks/results``; words are
written here. What is slower by 12 % takes 1.12 times as long.
"""

import re
from collections.abc import Iterable
from typing import Any

from four_gpus import of_one_call
from marked import ROOT, stored

README = ROOT / "README.md"
HELIX = "helix 2x1 weights"
LONG = f"{HELIX}, sequence split"
# The latest call of each.
SEED, QWEN = (f"{model}, a layer gathered by one kernel" for model in ("seed", "qwen"))
FOUR, OF_FOUR = "four_h200_rivals", "helix 4x1 weights"
Row = dict[str, Any]


def cell(name: str, file: str = "two_h200_rivals", kind: str = "cells") -> dict[str, Row]:
    """A call of a file, by arm."""
    (found,) = (one for one in stored(file)[kind] if one["name"] == name)
    return arms(found["rows"])


def arms(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by their arm."""
    return {row["arm"]: row for row in rows}


def than(one: float, other: float) -> str:
    """What a time is to another: ``12 % slower``; a digit more below a per cent."""
    change = 100 * (one / other - 1)
    size = f"{abs(change):.0f}" if abs(change) >= 0.95 else f"{abs(change):.1f}"
    return f"{size} % {'slower' if change > 0 else 'faster'}"


def time(one: Row, other: Row) -> str:
    """The same of two arms' steps."""
    return than(one["step_ms"], other["step_ms"])


def memory(one: Row, other: Row) -> str:
    """An arm's memory as a multiple of another's."""
    return f"{one['memory_mib'] / other['memory_mib']:.2f} times"


def between(ratios: Iterable[float], form: str = ".2f") -> str:
    """The least and the largest of them."""
    ratios = list(ratios)
    return f"{min(ratios):{form}} to {max(ratios):{form}}"


def choices() -> list[tuple[str, str, str]]:
    """What decides, what to take, and helix beside it."""
    seed, qwen = cell(SEED), cell(QWEN)
    fp8 = arms(stored("two_h200_fp8")["rows"])
    once, step = (qwen[f"{HELIX}, {how}"] for how in ("gathered once", "a step"))
    auto, faster = seed["M-FSDP, core attention auto"], seed[f"{HELIX}, gathered once"]
    long, split = cell("long"), cell("long, vocabulary gathered")
    packed = cell("documents", "two_h200_packed")
    kept, four = (
        cell("qwen, some layers' weights kept, third call"),
        f"{HELIX}, gathered once, 4 layers, sums in bf16",
    )
    short = cell("long, rows of 8192")
    of_step = f"{HELIX}, a step"
    pairs = [
        (rows[HELIX], rows["TP=2"]) for rows in map(cell, ("seed", "qwen", "seed, again", "long"))
    ]
    gains = between((100 * (1 - one["step_ms"] / tp["step_ms"]) for one, tp in pairs), ".0f")
    costs = between(one["memory_mib"] / tp["memory_mib"] for one, tp in pairs)
    passes = [
        (rows[HELIX], rows["DP=2"])
        for model in ("source", "qwen")
        for rows in [cell(f"{model} forward, beside rivals", "two_h200_matrix")]
    ]
    alone = between((100 * (one["step_ms"] / dp["step_ms"] - 1) for one, dp in passes), ".0f")
    sizes = between(one["memory_gb"] / dp["memory_gb"] for one, dp in passes)
    turns = arms(stored("two_h200_turns")["rows"])
    of_update = than(turns["helix 2x1"]["update_s"], turns["TP=2"]["update_s"])
    of_turn = than(turns["helix 2x1"]["turn_s"], turns["TP=2"]["turn_s"])
    few = cell("qwen, two query groups", FOUR, "referee")
    of_few = few[f"{OF_FOUR}, a step"]
    groups = {row["variant"]: row for row in stored("few_query_groups")["rows"]}
    shape = stored("few_query_groups")["shape"]

    def fewer(variant: str, bytes_: str = "exchange_bytes") -> str:
        return f"{groups['stock'][bytes_] / groups[variant][bytes_]:.1f}"

    return [
        (
            "memory: weights, gradients and Adam fit every GPU",
            "data parallelism with the distributed optimizer",
            f"{time(seed[HELIX], seed['DP=2'])} on the source's model at"
            f" {memory(seed[HELIX], seed['DP=2'])} the memory; on Qwen2.5-7B's shape"
            f" {time(step, qwen['DP=2'])} at {memory(step, qwen['DP=2'])} (`--helix-gather step`)"
            f" or {time(once, qwen['DP=2'])} at {memory(once, qwen['DP=2'])} (`once`); in FP8"
            f" {time(fp8[of_step], fp8['DP=2'])} at {memory(fp8[of_step], fp8['DP=2'])} (`step`);"
            f" a forward pass alone {alone} % slower at {sizes} times",
        ),
        (
            "memory: they fit when sharded, and micro-batches are large",
            "Megatron-FSDP",
            f"{time(seed[HELIX], seed['M-FSDP'])} on the source's model by its core attention, and"
            f" {time(seed[HELIX], auto)} where Megatron-FSDP takes that, too"
            f" (`--helix-core-attention auto`), {time(faster, auto)} at {memory(faster, auto)} the"
            " memory with `--helix-gather once`; on Qwen2.5-7B's shape"
            f" {time(qwen[HELIX], qwen['M-FSDP'])} at {memory(qwen[HELIX], qwen['M-FSDP'])},"
            " gradients added up in bf16 as there"
            f" {time(kept[four], kept['M-FSDP'])} at {memory(kept[four], kept['M-FSDP'])} the"
            " memory (`--helix-gather once --helix-gather-layers 4`), in FP8"
            f" {time(fp8[HELIX], fp8['M-FSDP'])} at {memory(fp8[HELIX], fp8['M-FSDP'])}",
        ),
        (
            "memory: activations must be cut, too; few tokens a micro-batch",
            "TP with sequence parallelism",
            f"`weights` is {gains} % faster with {costs} times the memory",
        ),
        (
            "sequence: one long one a micro-batch",
            "context parallelism, or Megatron-FSDP if it fits",
            f"{time(split[LONG], split['CP=2, p2p'])} at"
            f" {memory(split[LONG], split['CP=2, p2p'])} its memory;"
            f" {time(split[f'{LONG}, a step'], split['CP=2, p2p'])} at"
            f" {memory(split[f'{LONG}, a step'], split['CP=2, p2p'])} with `--helix-gather step`;"
            f" so at length 8192 {time(short[f'{LONG}, a step'], short['CP=2, p2p'])}."
            f" Two sequences a micro-batch: {time(long[HELIX], long['CP=2, p2p'])} at"
            f" {memory(long[HELIX], long['CP=2, p2p'])} (an earlier call)",
        ),
        (
            "packed rows: documents of very unequal length",
            "data or context parallelism; helix where memory is short",
            f"{time(packed[of_step], packed['DP=2'])} than DP at"
            f" {memory(packed[of_step], packed['DP=2'])} its memory with `--helix-gather step`,"
            f" {time(packed[HELIX], packed['DP=2'])} at {memory(packed[HELIX], packed['DP=2'])}"
            f" without; {time(packed[of_step], packed['CP=2, p2p'])} than CP, at"
            f" {memory(packed[of_step], packed['CP=2, p2p'])} its memory",
        ),
        (
            "heads: the degree divides neither heads nor query groups",
            "**helix**: stock refuses, or gathers QKV over the whole group",
            f"two query groups on four H200: {time(of_few, few['TP=4'])} than TP=4 at"
            f" {memory(of_few, few['TP=4'])} the memory; {shape['heads']} heads,"
            f" {shape['groups']} groups on {shape['m'] * shape['n']} ranks:"
            f" the exchange of `activations` sends {fewer('activations-batch')} times fewer bytes"
            f" than stock's gathered QKV, {fewer('activations-sequence')} with the sequence split;"
            f" the whole layer {fewer('activations-batch', 'sent_bytes')} times fewer (counted)",
        ),
        (
            "links: slow between groups of GPUs",
            "PP or DP over the slow link",
            "not measured; between 16 hosts the dim axis alone may cross it (predicted)",
        ),
        (
            "generating from the training partition, by turns or for good",
            "data parallelism where it fits, else TP",
            f"exact, nothing to switch, an update {of_update} than TP's, but slower decoding: a"
            f" turn of both is {of_turn}; not measured against engines",
        ),
    ]


def measured() -> list[tuple[str, str, str]]:
    """What was measured, where, and what was found."""
    hosts = stored("emulated_hosts")
    first, sharded = (_fastest(hosts["rows"], call) for call in (1, 3))
    weights = first["helix_8x2_weights"]
    baselines, tps, lost = four_gpus()
    pp = "TP=2, PP=2"
    return [
        (
            "exactness, bytes sent",
            "4 to 16 CPU ranks",
            "losses, gradients and generated tokens are stock's up to rounding"
            " ([how](docs/exactness.md)); bytes are those of the closed forms, on every rank",
        ),
        (
            "time behind slow links",
            f"16 emulated hosts of {hosts['rate_mbit']} Mbit/s, one machine",
            f"`weights` {first['tp8_pp2'] / weights:.1f} times as fast as the best TP=8, PP=2 and"
            f" {sharded['fsdp16'] / sharded['helix_8x2_weights']:.1f} times as FSDP over all 16,"
            f" torch's or Megatron's; TP=2, DP=8 {weights / first['tp2_dp8']:.1f} times as fast"
            " again, with eight times the weights a rank",
        ),
        (
            "time on GPUs",
            "four H200, fp16",
            "the source's models, experts evenly loaded: helix 4 x 1 `weights` is"
            f" {between(baselines)} times as fast as {pp} and {between(tps)} times as TP=4, its"
            f" TPOT {between(lost)} times the former's ([figures](docs/performance.md#measured))",
        ),
        (
            "",
            "four H200, bf16",
            "helix 4 x 1 `weights`, by its best way, beside the fastest rival; with Megatron's core"
            f" attention {rivals()}"
            " ([table](docs/performance.md#four-gpus-beside-rivals))",
        ),
        (
            "",
            "two H100, two H200",
            f"helix 2 x 1 `weights` is {between(two_gpus())} times as fast as TP=2 and PP=2, dense"
            " and MoE ([figures](docs/performance.md#measured))",
        ),
        (
            "the source's claims",
            "16 H100",
            "not reproduced. [Predicted](docs/performance.md): reached by some layouts, with large"
            " micro-batches; data parallelism is ahead where it fits",
        ),
    ]


def _fastest(rows: list[Row], call: int) -> dict[str, float]:
    """Seconds of each layout of a call, at its best micro-batch."""
    found: dict[str, float] = {}
    for row in rows:
        if row["call"] == call:
            found[row["layout"]] = min(row["step_s"], found.get(row["layout"], row["step_s"]))
    return found


def four_gpus() -> tuple[list[float], list[float], list[float]]:
    """Of every model and phase: factors to TP=2, PP=2 and to TP=4, TPOT as a part of the former's.

    Each layout at the best of what was tried.
    """
    results = stored("four_h200")
    baselines, tps, lost = [], [], []
    for place in ("prefill-dense", "train-dense", "prefill-moe", "train-moe"):

        def best(begin: str, place: str = place) -> Row:
            rows = (row for row in results[place] if re.match(begin, row["layout"]))
            return min(rows, key=lambda row: row["step_ms"])

        base, tp, helix = best("tp2_pp2"), best("tp4"), best("helix_4x1_(weights|step)")
        baselines.append(base["step_ms"] / helix["step_ms"])
        tps.append(tp["step_ms"] / helix["step_ms"])
        lost.append(helix["tpot_ms"] / base["tpot_ms"])
    return baselines, tps, lost


SAID = {
    "dense": "the dense model",
    "forward": "its forward pass alone",
    "moe": "the MoE",
    "qwen": "Qwen2.5-7B's shape",
    "qwen_forward": "its forward pass alone",
    "long": "one long sequence",
}


def rivals() -> str:
    """Of each model on four GPUs: helix's best beside the fastest rival, and that rival's name.

    First all with the layer spec's core attention, then all with helix's own, where that was tried.
    """
    specs, own = (
        "; ".join(
            _beside(SAID[one["name"]], rows)
            for one in stored(FOUR)["cells"]
            if (rows := [row for row in of_one_call(one["rows"]) if _core(row) == core])
        )
        for core in (None, "auto")
    )
    return f"{specs}; with helix's own core attention on both {own}"


def _core(row: Row) -> str | None:
    return row["layout"].get("core_attention")


def _beside(what: str, rows: list[Row]) -> str:
    rival, helix = (
        min((row for row in rows if ("m" in row["layout"]) is own), key=lambda r: r["step_ms"])
        for own in (False, True)
    )
    size = f"{helix['memory_gb'] / rival['memory_gb']:.2f}"
    name = rival["arm"].partition(",")[0]
    return f"{what} {time(helix, rival)} than {name} at {size} times its memory"


def two_gpus() -> list[float]:
    """Factors of helix by ``weights`` to TP=2 and to PP=2, wherever a call had them."""
    factors = []
    for one in stored("two_gpus")["cells"]:
        if one["phase"] not in ("train", "forward"):
            continue
        rows = [(row["layout"], row["step_ms"]) for row in one["rows"] if "step_ms" in row]
        own = [
            ms for keys, ms in rows if keys.get("exchange") == "weights" and "gather" not in keys
        ]
        rivals = [ms for keys, ms in rows if keys.get("tp") == 2 or keys.get("pp") == 2]
        factors += [rival / ms for ms in own for rival in rivals]
    return factors


TABLES = {
    "| what decides | take | helix beside it |": choices,
    "| | where | found |": measured,
}


def page(text: str) -> str:
    """The page with the rows of both tables made anew.

    Raises:
        ValueError: where one of them is not there.
    """
    for head, rows in TABLES.items():
        before, found, after = text.partition(f"{head}\n|---|---|---|\n")
        if not found:
            raise ValueError(f"README.md: has no table {head!r}; put its heading back")
        lines = "".join(
            "|" + "|".join(f" {part} " if part else " " for part in row) + "|\n" for row in rows()
        )
        text = before + found + lines + re.sub(r"\A(\|.*\n)+", "", after)
    return text


if __name__ == "__main__":
    README.write_text(page(README.read_text()))

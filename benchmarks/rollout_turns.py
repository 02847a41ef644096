"""A turn of reinforcement learning: one partition against Megatron's resharding between two.

    python benchmarks/rollout_turns.py --out runs/rollout_turns
    python benchmarks/rollout_turns.py --out runs/gpus --device cuda --ranks 2 --model 1b
        --prompts 128 --prompt-length 128 --new-tokens 128 --per-rank 64 --flags '--bf16 ...'

A turn is rollouts and one update, by the loop of ``examples/grpo``. Layouts of T ranks:
``helix_Tx1`` (``_step``: with ``--helix-gather step``), ``tpT`` and ``dpT`` train and generate in
one layout; ``dpT_to_tpT`` and, of four ranks, ``tp2_dp2_to_tp4`` train in theirs and generate as TP
in a second model, which ``megatron.core.resharding`` fills before every rollout. What times are
worth on CPUs is said in the README; bytes are the ledger's. ``gap`` is how far the update's forward
pass is from the log-probabilities of the rollout: a check of every layout, resharding included.

A layout's figures stay in OUT: a second call with the same options goes on where the first ended.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from rollout_rank import GATE, Case

from megatron_helix.experiment.execution import commit
from megatron_helix.launching import launchers
from megatron_helix.launching.failures import RunFailed, RunTimeoutError
from megatron_helix.launching.launcher_config import LauncherConfig

SP = "--sequence-parallel"
FIGURES = {
    "switch_s": "switch, s",
    "rollout_s": "rollout, s",
    "update_s": "update, s",
    "turn_s": "turn, s",
    "switch_bytes": "sent in the switch, bytes a rank",
    "rollout_bytes": "sent in the rollout, bytes a rank",
    "second_model_bytes": "second model, bytes a rank",
    "held_bytes": "held before the rollout, bytes a rank",
    "rollout_peak_bytes": "peak of the rollout, bytes a rank",
    "update_peak_bytes": "peak of the update, bytes a rank",
    "gap": "log-probabilities: update less rollout",
}
_LLAMA = ("--swiglu", "--normalization", "RMSNorm", "--untie-embeddings-and-output-weights")
MODELS = {
    "tiny": (
        *("--num-layers", "2", "--hidden-size", "128", "--num-attention-heads", "4"),
        *("--ffn-hidden-size", "512", "--vocab-size", "256"),
    ),
    # Of the shape of Llama 3.2 1B, with a smaller vocabulary: 1.1 billion parameters.
    "1b": (
        *("--num-layers", "16", "--hidden-size", "2048", "--num-attention-heads", "16"),
        *("--group-query-attention", "--num-query-groups", "8", "--kv-channels", "128"),
        *("--ffn-hidden-size", "8192", "--vocab-size", "32768", *_LLAMA),
    ),
}


def layouts(ranks: int) -> dict[str, tuple[int, bool, tuple[str, ...]]]:
    """Of a name: model-parallel ranks, whether it is resharded to generate, and flags."""
    helix = ("--helix-m", str(ranks), "--helix-n", "1", SP)
    tp = ("--tensor-model-parallel-size", str(ranks), SP)
    dp = ("--use-distributed-optimizer",)
    known = {
        f"helix_{ranks}x1": (ranks, False, helix),
        f"tp{ranks}": (ranks, False, tp),
        f"dp{ranks}_to_tp{ranks}": (1, True, dp),
        f"dp{ranks}": (1, False, dp),
        f"helix_{ranks}x1_step": (
            ranks,
            False,
            (*helix, "--helix-exchange", "weights", "--helix-gather", "step"),
        ),
    }
    if ranks == 4:
        mixed = ("--tensor-model-parallel-size", "2", SP, *dp)
        known["tp2_dp2_to_tp4"] = (2, True, mixed)
    return known


def main(
    out: Annotated[Path, typer.Option(help="Folder for the measurements.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What the ranks run on.")] = "cpu",
    ranks: Annotated[int, typer.Option(min=2, help="Of every layout.")] = 4,
    names: Annotated[str, typer.Option("--layouts", help="Names, with commas; all of them.")] = "",
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "tiny",
    turns: Annotated[int, typer.Option(min=1, help="Measured, after one that warms up.")] = 2,
    prompts: Annotated[int, typer.Option(help="Of a turn, all replicas together.")] = 8,
    group: Annotated[int, typer.Option(help="Answers to a prompt.")] = 8,
    prompt_length: Annotated[int, typer.Option(help="Tokens.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 8,
    per_rank: Annotated[int, typer.Option(help="Sequences of a micro-batch, for each rank.")] = 4,
    ahead: Annotated[int, typer.Option(help="Layouts that import while one has its turn.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds for a layout, imports apart.")] = 600.0,
    limit_all: Annotated[float, typer.Option(help="Seconds for all of them.")] = 1e9,
    flags: Annotated[str, typer.Option(help="More of Megatron's, for every layout.")] = "",
) -> None:
    """Measure turns of every layout and print a table: medians over turns of the rank with most."""
    known = layouts(ranks)
    chosen = [name.strip() for name in names.split(",")] if names else [*known]
    if unknown := set(chosen) - set(known):
        raise typer.BadParameter(f"--layouts: {', '.join(known)}, got {', '.join(unknown)}")
    if model not in MODELS:
        raise typer.BadParameter(f"--model: {', '.join(MODELS)}, got {model}")
    sizes = {
        "turns": turns,
        "prompts": prompts,
        "group": group,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
    }
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "ranks": ranks,
        "torch": torch.__version__,
        "commit": commit(),
        "source": "measured",
        "model": model,
        "flags": flags,
        "per_rank": per_rank,
        **sizes,
        "layouts": {},
    }
    end = time.time() + limit_all
    cases = {}
    for name in chosen:
        cut, resharded, layout = known[name]
        words = [
            *common(device, prompts * group, prompt_length + new_tokens, per_rank * cut),
            *(*MODELS[model], *layout, *flags.split()),
        ]
        folder = (out / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GATE).unlink(missing_ok=True)
        cases[name] = Case(flags=words, resharded=resharded, out=folder, **sizes)
    known_places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(known_places))
    with ThreadPoolExecutor(1 + ahead) as pool:
        runs = {
            name: pool.submit(run, case, ranks, in_time(case.out / GATE, limit, end))
            for name, case in cases.items()
        }
        for name, case in cases.items():
            (case.out / GATE).touch()
            try:
                runs[name].result()
                results["layouts"][name] = measured(case, ranks)
            except (RunFailed, ValueError) as failure:
                results["layouts"][name] = str(failure)
            print(name, json.dumps(results["layouts"][name]), flush=True)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def common(device: str, sequences: int, length: int, micro_batch: int) -> list[str]:
    """Megatron's flags that are the same for all layouts, but for the micro-batch."""
    return [
        *("--helix-device", device, "--position-embedding-type", "rope", "--disable-bias-linear"),
        *("--tokenizer-type", "NullTokenizer", "--make-vocab-size-divisible-by", "16"),
        *("--seq-length", str(length), "--max-position-embeddings", str(length)),
        *("--micro-batch-size", str(micro_batch), "--global-batch-size", str(sequences)),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--calculate-per-token-loss"),
        *("--lr", "1e-5", "--lr-decay-style", "constant", "--train-iters", "1000000"),
        *("--mock-data", "--eval-iters", "0", "--rerun-mode", "disabled"),
    ]


def in_time(gate: Path, limit_s: float, end: float) -> Callable[[], None]:
    """Raises :class:`RunTimeoutError`: too long after the gate was opened, or at the end of all."""

    def check() -> None:
        now = time.time()
        if now > end or (gate.exists() and now > gate.stat().st_mtime + limit_s):
            raise RunTimeoutError("was not done in its time")

    return check


def run(case: Case, ranks: int, poll: Callable[[], None]) -> None:
    """Start the ranks of a case and wait for them, unless an earlier call did.

    Raises:
        RunFailed: when one fails, or what ``poll`` raises.
    """
    said, file = case.model_dump_json(indent=1), case.out / "case.json"
    files = figures(case, ranks)
    if file.exists() and file.read_text() == said and all(one.exists() for one in files):
        return
    for old in files:
        old.unlink(missing_ok=True)
    file.write_text(said)
    program = launchers.Program(words=["rollout_rank", str(file)])
    launchers.start(LauncherConfig(kind="torchrun"), program, ranks, case.out / "logs", poll=poll)


def figures(case: Case, ranks: int) -> list[Path]:
    """The files of a case's ranks."""
    return [case.out / f"rank{rank}.json" for rank in range(ranks)]


def measured(case: Case, ranks: int) -> dict[str, float]:
    """Of each figure the median over turns, of the rank with most."""
    found = [json.loads(file.read_text()) for file in figures(case, ranks)]
    return {key: max(statistics.median(one[key]) for one in found) for key in FIGURES}


def show(results: dict[str, Any]) -> None:
    """The table, who is ahead, and what could not run."""
    done = {name: one for name, one in results["layouts"].items() if isinstance(one, dict)}
    console = Console(width=max(100, 40 + 18 * len(done)))
    table = Table("of the rank with most, median over turns", *done)
    for key, label in FIGURES.items():
        table.add_row(label, *(_said(key, one[key]) for one in done.values()))
    console.print(table)
    for name, why in results["layouts"].items():
        if name not in done:
            console.print(f"{name}: {why}")
    order = sorted(done, key=lambda name: done[name]["turn_s"])
    for name in order[1:]:
        more = done[name]["turn_s"] / done[order[0]]["turn_s"] - 1
        console.print(f"{order[0]} is ahead of {name}, whose turn takes {more:.1%} longer")


def _said(key: str, value: float) -> str:
    if key == "gap":
        return f"{value:.1e}"
    return f"{value:.3f}" if key.endswith("_s") else f"{value:,.0f}"


if __name__ == "__main__":
    typer.run(main)

"""What the ledger costs: steps of one training run with it and without it, in turns.

    .venv/bin/python benchmarks/ledger_overhead.py --out runs/ledger_overhead

One run of the quickstart's dense model on four CPU ranks: its collectives are small and many. All
ranks take the ledger out before every second step and put it back after: CPU time and time on the
wall, side by side, medians over steps and means over ranks. On shared cores they vary by more than
the ledger costs, so a call is measured by itself, too: exit code 1 if a step's calls cost more than
the limit.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_helix import pretrain_gpt
from megatron_helix.basics import files
from megatron_helix.experiment import config, runs
from megatron_helix.launching import fork_ranks
from megatron_helix.recording.comm_ledger import CommLedger, install
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.upstream import patches

QUICKSTART = Path(__file__).parent.parent / "configs" / "experiments" / "quickstart.yaml"
LIMIT = 0.02
WARMUP_STEPS = 2


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Overhead of the communication ledger")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--steps", type=int, default=42, help="steps of the run")
    asked = parser.parse_args()
    layout = LayoutConfig(name="helix_2x2", m=2, n=2, exchange="activations", micro_batch=4)
    experiment = config.load(QUICKSTART).model_copy(
        update={"layouts": [layout], "world_size": 4, "steps": asked.steps}
    )
    model = experiment.models[0]
    run = runs.Run(model=model, layout=layout, phase="train", precision="fp32")
    console = Console()
    prefix = runs.corpus_dataset(asked.out, console)
    runs.initial_weights(experiment, model, prefix, asked.out)
    flags = runs.run_flags(experiment, run, prefix, asked.out)
    place = flags.index("--helix-metrics")  # its own observer would measure, too
    del flags[place : place + 2]
    ready = pretrain_gpt.prepare(flags, experiment.world_size)
    ranks = fork_ranks.Ranks(
        target=_train, args=(ready, asked.out), world_size=4, logs=asked.out / "logs"
    )
    fork_ranks.run(ranks, timeout_s=1800)
    found = [json.loads(file.read_text()) for file in files.of_ranks(asked.out, ".json")]
    overhead = {}
    for what in ("cpu_s", "wall_s"):
        on, off = (
            statistics.mean(statistics.median(rank[what][state]) for rank in found)
            for state in ("on", "off")
        )
        overhead[what] = on / off - 1
        console.print(
            f"{what}: {off * 1e3:.2f} ms a step without the ledger, {on * 1e3:.2f} ms with it:"
            f" {overhead[what]:+.2%}"
        )
    calls, step_s = found[0]["calls"], statistics.median(found[0]["cpu_s"]["off"])
    call_s = _call_s()
    share = calls * call_s / step_s
    console.print(
        f"{calls} calls a step and rank, {call_s * 1e6:.2f} us of the ledger in each:"
        f" {share:.2%} of a rank's CPU time; limit {LIMIT:.0%}"
    )
    return int(share > LIMIT)


def _call_s(calls: int = 5000, rounds: int = 9) -> float:
    """What the ledger adds to a collective, seconds of CPU: on a group of one, with and without."""
    dist.init_process_group("gloo", store=HashStore(), world_size=1, rank=0)
    tensor, ledger = torch.ones(1), CommLedger()
    spent: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * rounds):
        uninstall = install(ledger) if turn % 2 else None
        start = time.process_time()
        for _ in range(calls):
            dist.all_reduce(tensor)
        ledger.take()
        spent[turn % 2 == 1].append((time.process_time() - start) / calls)
        if uninstall:
            uninstall()
    dist.destroy_process_group()
    return statistics.median(spent[True]) - statistics.median(spent[False])


def _train(flags: list[str], out: Path) -> None:
    """One rank: train, with the ledger in every second step."""
    times: dict[str, dict[str, list[float]]] = {
        what: {"on": [], "off": []} for what in ("cpu_s", "wall_s")
    }
    ledger = CommLedger()
    done = calls = 0

    def observed(train_step: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done, calls
        uninstall = install(ledger) if done % 2 else None
        cpu, wall = time.process_time(), time.perf_counter()
        result = train_step(*args, **kwargs)
        if uninstall:
            calls = len(ledger.take_calls())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if uninstall:
            uninstall()
        if done >= WARMUP_STEPS:
            state = "on" if uninstall else "off"
            times["cpu_s"][state].append(cpu)
            times["wall_s"][state].append(wall)
        done += 1
        return result

    patches.observe_train_step(observed)
    pretrain_gpt.train(flags)
    files.of_rank(out, int(os.environ["RANK"]), ".json").write_text(
        json.dumps({**times, "calls": calls})
    )


if __name__ == "__main__":
    sys.exit(main())

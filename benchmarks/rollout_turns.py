"""A turn of reinforcement learning: one partition against Megatron's resharding between two.

    python benchmarks/rollout_turns.py --out runs/rollout_turns

The loop of ``examples/grpo`` on four CPU ranks. ``helix_4x1`` and ``tp4`` train and generate in one
layout. ``dp4`` and ``tp2_dp2`` train in theirs and generate as TP=4 in a second model, which
``megatron.core.resharding`` fills before every rollout. What times are worth on CPUs is said in
the README; bytes are the ledger's, and what a second model holds is counted on its tensors.
"""

import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from megatron_helix import pretrain_gpt
from megatron_helix.launching import fork_ranks
from megatron_helix.recording.comm_ledger import CommLedger, install

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo"
RANKS = 4
SP = "--sequence-parallel"
LAYOUTS = {
    "helix_4x1": ("--helix-m", "4", "--helix-n", "1", SP),
    "tp4": ("--tensor-model-parallel-size", "4", SP),
    "dp4": ("--tensor-model-parallel-size", "1"),
    "tp2_dp2": ("--tensor-model-parallel-size", "2", SP),
}
RESHARDED = ("dp4", "tp2_dp2")
FIGURES = {
    "switch_s": "switch, s",
    "rollout_s": "rollout, s",
    "update_s": "update, s",
    "switch_bytes": "sent in the switch, bytes a rank",
    "rollout_bytes": "sent in the rollout, bytes a rank",
    "second_model_bytes": "second model, bytes a rank",
    "resident_bytes": "peak resident, bytes a rank",
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for the measurements.")],
    layouts: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(LAYOUTS),
    turns: Annotated[int, typer.Option(min=1, help="Measured, after one that warms up.")] = 3,
    width: Annotated[int, typer.Option(help="Of the model.")] = 256,
    prompts: Annotated[int, typer.Option(help="Of a turn, all replicas together.")] = 8,
    group: Annotated[int, typer.Option(help="Answers to a prompt.")] = 8,
) -> None:
    """Measure turns of every layout and print a table: medians over turns of the slowest rank."""
    sys.path.insert(0, str(EXAMPLE))
    import grpo  # pyright: ignore[reportMissingImports]

    chosen = [name.strip() for name in layouts.split(",")]
    if unknown := set(chosen) - set(LAYOUTS):
        raise typer.BadParameter(f"--layouts: {', '.join(LAYOUTS)}, got {', '.join(unknown)}")
    measured: dict[str, list[dict[str, list[float]]]] = {}
    for name in chosen:
        replicas = {"dp4": 4, "tp2_dp2": 2}.get(name, 1)
        words = ["--out", str(out / name), "--width", str(width), "--turns", str(turns)]
        words += ["--prompts", str(prompts // replicas), "--group", str(group)]
        options, layout = grpo.parsed([*words, "--", *LAYOUTS[name]])
        completed = pretrain_gpt.prepare(grpo.flags(options, layout), RANKS)
        (out / name).mkdir(parents=True, exist_ok=True)
        args = (options, completed, name in RESHARDED)
        fork_ranks.run(
            fork_ranks.Ranks(target=measure, args=args, world_size=RANKS, logs=out / name / "logs")
        )
        files = [out / name / f"rank{rank}.json" for rank in range(RANKS)]
        measured[name] = [json.loads(file.read_text()) for file in files]
    table = Table("of the rank with most, median over turns", *measured)
    for key, label in FIGURES.items():
        table.add_row(label, *(_cell(key, ranks) for ranks in measured.values()))
    Console().print(table)


def _cell(key: str, ranks: list[dict[str, list[float]]]) -> str:
    """Of the rank with most: the median over turns."""
    value = max(statistics.median(rank[key]) for rank in ranks)
    return f"{value:.2f}" if key.endswith("_s") else f"{value:,.0f}"


def measure(options: Any, completed: Sequence[str], resharded: bool) -> None:
    """One rank: turns, and a file of what each took."""
    import grpo  # pyright: ignore[reportMissingImports]
    from megatron.core import parallel_state
    from megatron.training import get_args

    model, optimizer = grpo.set_up(completed)
    target = generating_model() if resharded else None
    replica = parallel_state.get_data_parallel_rank()
    # One generating model has all prompts; a replica that generates for itself has its own.
    dice = random.Random(options.seed)
    found: dict[str, list[float]] = {key: [] for key in FIGURES}
    ledger = CommLedger()
    install(ledger)

    def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
        dist.barrier()
        ledger.take()
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        return result, seconds, sum(entry.sent_bytes for entry in ledger.take().values())

    if target:
        options.prompts *= parallel_state.get_data_parallel_world_size()
    for turn in range(options.turns + 1):
        _, switch_s, switch_bytes = timed(lambda: reshard(model, target))
        chunks = [target] if target else model
        (written, _), rollout_s, rollout_bytes = timed(
            lambda seed=turn, chunks=chunks: grpo.answers(chunks, options, dice, seed)
        )
        if target:
            size = len(written) // parallel_state.get_data_parallel_world_size()
            written = written[replica * size :][:size]
        rows = grpo.pack(written, get_args().seq_length)
        _, update_s, _ = timed(lambda rows=rows: grpo.update(model, optimizer, rows))
        values = {
            "switch_s": switch_s,
            "rollout_s": rollout_s,
            "update_s": update_s,
            "switch_bytes": switch_bytes,
            "rollout_bytes": rollout_bytes,
            "second_model_bytes": held(target) if target else 0,
            "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        for key, value in values.items():
            if turn:  # the first one warms up
                found[key].append(value)
    (options.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


def reshard(model: list[Any], target: Any) -> None:
    """Megatron's: the weights that are trained into the model that generates."""
    if target is None:
        return
    from megatron.core.resharding import swap_model_weights

    swap_model_weights(model, target, refit_method="gloo")


def generating_model() -> Any:
    """The same model as TP=4, without sequence parallelism, on groups of its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args
    from megatron.training.argument_utils import gpt_config_from_args

    everyone = dist.new_group(range(RANKS))
    singles = [dist.new_group([rank]) for rank in range(RANKS)]
    alone = singles[dist.get_rank()]
    names = ("pp", "cp", "ep", "dp", "dp_cp", "expt_dp", "embd", "pos_embd", "tp_dp_cp")
    groups = ProcessGroupCollection(
        **dict.fromkeys(("tp", "mp", "tp_cp", "expt_tp", "tp_ep", "tp_ep_pp"), everyone),
        **dict.fromkeys(names, alone),
    )
    config = gpt_config_from_args(get_args())
    config.transformer.tensor_model_parallel_size = RANKS
    config.transformer.sequence_parallel = False
    return config.get_builder_cls()(config).build_model(groups).eval()


def held(model: torch.nn.Module) -> int:
    """Bytes of its weights on this rank."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


if __name__ == "__main__":
    typer.run(main)

"""Layouts side by side on sixteen emulated hosts, where bandwidth decides, as it does on GPUs.

    sudo .venv/bin/python benchmarks/emulated_cluster.py --out runs/emulated

Every rank is a host of its own behind a slow link (see ``emulated_hosts.py``). Layouts take turns,
round after round, from the same initial weights and on the same data; a round is one training run
of a few steps. The table gives the median step over all rounds with its spread, and the largest
relative difference of the losses to those of the first layout: the runs must be the same training.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from emulated_hosts import Hosts, emulated_hosts
from rich.console import Console
from rich.table import Table

from megatron_helix import pretrain_gpt
from megatron_helix.experiment import metrics, results, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.launching import fork_ranks
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

MODEL = ModelConfig(
    name="emulated",
    num_layers=4,
    hidden_size=128,
    num_attention_heads=16,
    kv_channels=32,
    ffn_hidden_size=512,
    untie_embeddings_and_output_weights=True,  # as torch FSDP2 needs it
)
LAYOUTS = [
    *(LayoutConfig(name=f"tp8_pp2_mb{b}", tp=8, pp=2, micro_batch=b) for b in (2, 4, 8)),
    LayoutConfig(name="tp16", tp=16, micro_batch=8),
    LayoutConfig(name="tp4_dp4", tp=4, micro_batch=4, distributed_optimizer=True),
    LayoutConfig(name="tp2_dp8", tp=2, micro_batch=2, distributed_optimizer=True),
    LayoutConfig(name="fsdp16", tp=1, fsdp="torch_fsdp2", micro_batch=1),
    LayoutConfig(name="megatron_fsdp16", tp=1, fsdp="megatron_fsdp", micro_batch=1),
    LayoutConfig(name="helix_4x4_activations", m=4, n=4, exchange="activations", micro_batch=8),
    LayoutConfig(name="helix_4x4_weights", m=4, n=4, exchange="weights", micro_batch=8),
    LayoutConfig(name="helix_8x2_weights", m=8, n=2, exchange="weights", micro_batch=8),
    LayoutConfig(name="helix_8x2_weights_mb16", m=8, n=2, exchange="weights", micro_batch=16),
    LayoutConfig(name="helix_8x2_step", m=8, n=2, exchange="weights", gather="step", micro_batch=8),
    LayoutConfig(
        name="helix_8x2_step_mb16", m=8, n=2, exchange="weights", gather="step", micro_batch=16
    ),
    LayoutConfig(name="helix_16x1_weights_mb16", m=16, n=1, exchange="weights", micro_batch=16),
    LayoutConfig(name="helix_4x4_auto", m=4, n=4, micro_batch=8),
]


def main() -> int:
    """Run the benchmark; exit code 1 when a layout is not the same training as the first."""
    parser = argparse.ArgumentParser(description="Layouts on sixteen emulated hosts")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--rate", default="20mbit", help="what each host's link sends")
    parser.add_argument("--rounds", type=int, default=2, help="turns each layout has")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a turn, the first to warm up"
    )
    parser.add_argument("--layouts", nargs="*", help="names; all by default")
    asked = parser.parse_args()
    layouts = [item for item in LAYOUTS if not asked.layouts or item.name in asked.layouts]
    experiment = ExperimentConfig(
        name="emulated",
        models=[MODEL],
        layouts=layouts,
        world_size=16,
        batch=BatchConfig(sequences=16, sequence_length=256),
        steps=asked.steps,
        learning_rate=3e-4,
        device="cpu",
    )
    console = Console()
    prefix = runs.corpus_dataset(asked.out, console)
    runs.initial_weights(experiment, MODEL, prefix, asked.out)
    turns: dict[str, list[metrics.RunMetrics]] = {layout.name: [] for layout in layouts}
    with emulated_hosts(experiment.world_size, asked.rate) as hosts:
        for round_ in range(asked.rounds):
            for layout in layouts:
                out = asked.out / f"round{round_}"
                run = runs.Run(model=MODEL, layout=layout, phase="train", precision="fp32")
                flags = runs.run_flags(experiment, run, prefix, asked.out)
                flags += ["--helix-metrics", str(out / layout.name)]
                turns[layout.name].append(_turn(flags, hosts, out / layout.name))
                step_s = turns[layout.name][-1].step_ms / 1e3
                console.print(f"round {round_}: {layout.name}: {step_s:.2f} s a step")
    rows = [_row(name, measured, turns[layouts[0].name][0]) for name, measured in turns.items()]
    (asked.out / "results.json").write_text(
        json.dumps({"rate": asked.rate, "source": "measured", "runs": rows}, indent=2) + "\n"
    )
    console.print(_table(rows, asked.rate))
    return int(any(row["loss_difference"] > experiment.tolerance.loss for row in rows))


def _turn(flags: list[str], hosts: Hosts, folder: Path) -> metrics.RunMetrics:
    """One training run on the emulated hosts."""
    ready = pretrain_gpt.prepare(flags, hosts.count)
    fork_ranks.run(
        fork_ranks.Ranks(
            target=pretrain_gpt.train,
            args=(ready,),
            world_size=hosts.count,
            logs=folder / "logs",
            address=hosts.address,
            enter=hosts.enter,
        ),
        timeout_s=1800,
    )
    return metrics.read(folder)


def _row(name: str, turns: list[metrics.RunMetrics], first: metrics.RunMetrics) -> dict[str, Any]:
    steps_s = [turn.step_ms / 1e3 for turn in turns]
    return {
        "layout": name,
        "step_s": statistics.median(steps_s),
        "step_s_spread": max(steps_s) - min(steps_s),
        "sent_mb": sum(turns[0].sent_bytes.values()) / 1e6,
        "tpot_ms": statistics.median(turn.tpot_ms for turn in turns),
        "last_loss": turns[0].losses[-1],
        "loss_difference": results.largest_difference(turns[0].losses, first.losses),
    }


def _table(rows: list[dict[str, Any]], rate: str) -> Table:
    made = Table(title=f"Training step on 16 emulated hosts at {rate}, measured")
    for heading in ("layout", "s a step", "spread", "sent MB a rank", "last loss", "difference"):
        made.add_column(heading, justify="left" if heading == "layout" else "right")
    for row in rows:
        made.add_row(
            row["layout"],
            f"{row['step_s']:.2f}",
            f"{row['step_s_spread']:.2f}",
            f"{row['sent_mb']:.2f}",
            f"{row['last_loss']:.6f}",
            f"{row['loss_difference']:.1e}",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())

"""Helix and stock from the same seeds: ``python examples/grpo/seeds.py OUT``.

Each run is one of ``grpo.py`` and keeps its turns in ``OUT/LAYOUT-seedN``; one that is complete is
not made again. ``OUT/seeds.json`` then has the curves of all of them, and until which turn a seed's
are equal: the weights and the problems are, and all that differs between layouts is rounding, until
one of them draws another token.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import report

LAYOUTS = {
    "helix_4x1": ("--helix-m", "4", "--helix-n", "1", "--sequence-parallel"),
    "tp4": ("--tensor-model-parallel-size", "4", "--sequence-parallel"),
}
Curves = dict[str, list[dict[str, Any]]]


def main(argv: Sequence[str]) -> None:
    """Make the runs that are missing, and put them together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="Folder of the runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--turns", type=int, default=80)
    options = parser.parse_args(argv)
    curves: dict[int, Curves] = {}
    for seed in options.seeds:
        curves[seed] = {
            name: turns_of(options.out / f"{name}-seed{seed}", name, seed, options.turns)
            for name in LAYOUTS
        }
    found = {"turns": options.turns, "seeds": {seed: summary(one) for seed, one in curves.items()}}
    (options.out / "seeds.json").write_text(json.dumps(found) + "\n")
    for seed, one in found["seeds"].items():
        ends = ", ".join(f"{name} {reward[-1]:.3f}" for name, reward in one["reward"].items())
        print(f"seed {seed}: equal for {one['equal']} turns; reward of the last: {ends}")


def turns_of(out: Path, name: str, seed: int, turns: int) -> list[dict[str, Any]]:
    """The turns of one run, made if they are not there."""
    there = (out / report.TURNS).exists() and len(report.read(out)) == turns
    if not there:
        script = Path(__file__).with_name("grpo.py")
        words = ("--out", str(out), "--seed", str(seed), "--turns", str(turns))
        subprocess.run([sys.executable, str(script), *words, "--", *LAYOUTS[name]], check=True)
    return report.read(out)


def summary(curves: Curves) -> dict[str, Any]:
    """A seed's curves, and the turns until rounding parts them: reward and length are equal."""
    figures = {
        key: {name: [round(one[key], 6) for one in turns] for name, turns in curves.items()}
        for key in report.CURVES
    }
    said = [
        [tuple(one[key] for key in report.CURVES) for one in turns] for turns in curves.values()
    ]
    alike = takewhile(lambda turn: len(set(turn)) == 1, zip(*said, strict=True))
    return {**figures, "equal": sum(1 for _ in alike)}


if __name__ == "__main__":
    main(sys.argv[1:])

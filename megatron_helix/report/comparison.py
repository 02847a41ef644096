"""Two finished experiments side by side, if they are of the same models, data and batch."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from rich import box
from rich.table import Table

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment.results import Result, change, read, significant
from megatron_helix.run_config.files import Config

# What must be equal for the figures of two experiments to be of the same work.
EQUAL = ("models", "batch", "decode", "steps", "learning_rate")

SHOWN = 6  # keys that differ
LONGEST = 60  # characters of a value

Pair = tuple[Result, Result]


def pairs(first: Path, second: Path) -> list[Pair]:
    """The runs that both have, by name.

    Args:
        first: folder of an experiment.
        second: of another.

    Raises:
        UserError: when one is not finished, or they are not of the same work.
    """
    a, b = read(first), read(second)
    for what in EQUAL:
        one, other = getattr(a["experiment"], what), getattr(b["experiment"], what)
        if one != other:
            differing = _differences(one, other)
            here, there = (", ".join(said[:SHOWN]) for said in zip(*differing, strict=True))
            more = f" (and {len(differing) - SHOWN} more)" if len(differing) > SHOWN else ""
            raise UserError(
                f"compare: {what} must be equal, got {here} in {first} and {there} in"
                f" {second}{more}; run both with the same {what}"
            )
    for folder, found in ((first, a), (second, b)):
        if not found["data"]:
            raise UserError(
                f"compare: {folder} must say what it was trained on, and nodes/ has no record of"
                f" the data; call `helix run EXPERIMENT --out {folder}` once more"
            )
    if [*a["data"].values()] != [*b["data"].values()]:
        raise UserError(
            f"compare: the data of {first} and {second} must be equal, and differ; run both with"
            " the same `data`, or, where none is named, the same Python, whose library it is"
        )
    others = {result["name"]: result for result in b["results"]}
    found = [(one, others[one["name"]]) for one in a["results"] if one["name"] in others]
    if not found:
        raise UserError(
            f"compare: {first} and {second} have no run of the same name; give their layouts the"
            " same names"
        )
    return found


def as_json(compared: list[Pair]) -> list[dict[str, Any]]:
    """Per run the figures of both, the first experiment's first."""
    return [
        {
            "name": one["name"],
            "source": "measured",
            "commits": [one["commit"], other["commit"]],
            "tokens_per_s": [one["tokens_per_s"], other["tokens_per_s"]],
            "tpot_ms": [one["tpot_ms"], other["tpot_ms"]],
            "sent_bytes": [_sent(one), _sent(other)],
            "last_loss": [_last_loss(one), _last_loss(other)],
        }
        for one, other in compared
    ]


def table(first: Path, second: Path) -> Table:
    """Figures of the second experiment, and in brackets what has changed; errors of :func:`pairs`.

    The title says what may differ: device, ranks and precision.
    """
    compared = pairs(first, second)
    here, there = (_where(folder) for folder in (second, first))
    title = f"{second} ({here}) against {first} ({there}), measured"
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("run", "TPS", "TPOT ms", "MB sent", "last loss"):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    for one, other in compared:
        cells = [
            f"{significant(other[key])}{change(other[key], one[key])}"
            for key in ("tokens_per_s", "tpot_ms")
        ]
        cells.append(f"{significant(_sent(other) / 1e6)}{change(_sent(other), _sent(one))}")
        before, after = _last_loss(one), _last_loss(other)
        cells.append("-" if before is None else f"{after:.6f} ({after - before:+.1e})")
        made.add_row(one["name"], *cells)
    return made


def _where(folder: Path) -> str:
    asked = read(folder)["experiment"]
    return f"{asked.world_size} {asked.device} ranks, {asked.precision}"


def _sent(result: Result) -> float:
    return sum(result["sent_bytes"].values())


def _last_loss(result: Result) -> Any:
    """None for decode."""
    return next(iter(result.get("losses", ())[-1:]), None)


def _differences(one: Any, other: Any, path: str = "") -> list[tuple[str, str]]:
    """The keys in which two values of a config differ, with what is said of either."""
    here, there = _inside(one), _inside(other)
    if not (here and there):
        return [(_said(path, one), _said(path, other))]
    found = []
    for key in {**here, **there}:
        below = f"{path}.{key}" if path else key
        if not (key in here and key in there):
            found.append((below, f"no {below}") if key in here else (f"no {below}", below))
        elif here[key] != there[key]:
            found += _differences(here[key], there[key], below)
    return found


def _inside(value: Any) -> dict[str, Any]:
    """What a mapping, or a list of named ones, holds by key or name; nothing, of other values."""
    if isinstance(value, Config):
        return {key: getattr(value, key) for key in type(value).model_fields}
    if isinstance(value, list):
        return {item.name: item for item in value}
    return {}


def _said(path: str, value: Any) -> str:
    return shorten(f"{path} {value}", LONGEST, placeholder="...")

"""Writes the tables of docs/experiments.md: ``python docs/experiments.py``.

A test compares. Keys, types and defaults are those of the config classes, and what a key means is
what their docstrings say. What stands outside the marks is written by hand and kept.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.machine.hardware import Hardware
from megatron_helix.run_config.model import ModelConfig

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- tables -->", "<!-- tables end -->"
TOP = "The file"
HARDWARE = "[a hardware file](contributing.md#a-hardware-file)"
# Given by the path of a file as well, relative to the experiment's.
IN_FILES = {"models", "hardware", "outlook.experiment", "outlook.hardware"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def tables() -> str:
    """A table for every mapping of an experiment file, under the path of its key."""
    parts = []
    for path, kind in kinds():
        heading = f"`{path}`" if path else TOP
        parts += [f"## {heading}", "", *introduction(kind), *table(path, kind), ""]
    return "\n".join(parts)


def kinds() -> Iterator[tuple[str, type[BaseModel]]]:
    """The mappings of a file, each once, by the path of the key that holds it."""
    found: dict[type[BaseModel], str] = {}
    ahead: list[tuple[str, type[BaseModel]]] = [("", ExperimentConfig)]
    while ahead:
        path, kind = ahead.pop(0)
        if kind in found or kind is Hardware:
            continue
        found[kind] = path
        yield path, kind
        for name, field in kind.model_fields.items():
            below = f"{path}.{name}" if path else name
            ahead += [(below, inner) for inner in configs(field.annotation)]


def configs(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for inner in getattr(annotation, "__args__", ()) for one in configs(inner)]


def introduction(kind: type[BaseModel]) -> list[str]:
    """What the class is, in its docstring's first paragraph."""
    if kind is ExperimentConfig:
        return []
    return [" ".join(str(kind.__doc__).split("\n\n")[0].split()).replace("``", "`"), ""]


def table(path: str, kind: type[BaseModel]) -> list[str]:
    """Key, type, default and meaning."""
    schema = kind.model_json_schema()
    schema = schema["$defs"][kind.__name__] if "$ref" in schema else schema
    said = meanings(kind)
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, about in schema["properties"].items():
        below = f"{path}.{name}" if path else name
        required = name in schema.get("required", ())
        default = "**required**" if required else shown(about.get("default"))
        kind_of = value(about)
        if below in IN_FILES:
            kind_of += (
                ", or of paths to them" if kind_of.startswith("list") else ", or a path to it"
            )
        rows.append(f"| `{name}` | {kind_of} | {default} | {said[name]} |")
    return rows


def meanings(kind: type[BaseModel]) -> dict[str, str]:
    """What the docstring says of each key; a model's other keys are Megatron's flags.

    Raises:
        KeyError: for a key that nothing is said of.
    """
    section = str(kind.__doc__).partition("Attributes:\n")[2]
    said = {
        name: " ".join(text.split()).replace("``", "`")
        for name, text in re.findall(r"^        (\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    }
    if kind is ModelConfig:
        flags = {name: f"`--{name.replace('_', '-')}`" for name in kind.model_fields}
        said = {**flags, **said}
    missing = kind.model_fields.keys() - said.keys()
    if missing:
        raise KeyError(f"{kind.__name__}: the docstring must say what {missing} mean")
    return {name: text.replace("|", "\\|") for name, text in said.items()}


def value(about: dict[str, Any]) -> str:
    """The type of a JSON schema in a few words."""
    if "$ref" in about:
        return reference(about["$ref"].rpartition("/")[2])
    if choices := about.get("anyOf"):
        return " or ".join(value(one) for one in choices if one.get("type") != "null")
    if choices := about.get("enum"):
        return ", ".join(f"`{one}`" for one in choices)
    if about.get("type") == "array":
        if inner := about.get("prefixItems"):
            return f"{len(inner)} times {value(inner[0])}"
        return f"list of {value(about['items'])}"
    words = {"boolean": "`true`, `false`", "string": "text"}
    if about.get("format") == "path":
        return "path"
    name = words.get(kind := str(about["type"]), kind)
    limits = [f"{sign} {about[key]:g}" for key, sign in BOUNDS.items() if key in about]
    return " ".join([name, *limits])


def reference(name: str) -> str:
    """A link to what a key holds."""
    if name == Hardware.__name__:
        return HARDWARE
    if name == ExperimentConfig.__name__:
        return "[an experiment](#the-file)"
    path = next(path for path, kind in kinds() if kind.__name__ == name)
    return f"[`{path}`](#{path.replace('.', '')})"


def shown(default: Any) -> str:
    """A default as a file would have it; those of a mapping stand in its own table."""
    if default is None or isinstance(default, dict):
        return ""
    return f"`{json.dumps(default)}`" if default != [] else ""


def page(text: str) -> str:
    """The page with its tables made anew."""
    made = f"{BEGIN}\n\n{tables()}\n{END}"
    return re.sub(rf"{BEGIN}.*{END}", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

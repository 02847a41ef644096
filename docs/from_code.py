"""Writes what the pages flags and troubleshooting have of the code: ``python docs/from_code.py``.

Flags, commands and error messages; a test compares. What stands outside the marks is written by
hand and kept.
"""

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_helix"
PAGES = [ROOT / "docs" / name for name in ("flags.md", "troubleshooting.md")]

# What to do where a message ends without saying so. Keys are the starts of messages.
REMEDIES = {
    "megatron-core: TransformerConfig was expected": "install a megatron-core that"
    " requirements/cpu.txt names",
    "the CPU device was asked for": "follow one of the two",
    "phases: must differ": "name each phase once",
    "launcher.nodes: must divide": "change one of the two in the experiment file",
    "{what}: names must differ": "rename one of them in the experiment file",
    "claims: {what}": "correct the name, or take the claim out",
    "dag:": "rename the node, or correct what it needs",
    "the deployment of": "report it: a deployment has no cycle by construction",
    "{folder}: need the same number of steps": "a run was interrupted: remove its folder",
    "{folder}: need the files of a finished": "measure first, then read",
    "ranks {sorted(left)}": "read the ranks' logs: one waits for a collective that another skipped",
    "{Path(command[0]).name}: a rank failed": "read the log that the message names",
    "{argument}: must be one of": "take one of the names",
    "{flag}: must be one of": "take one of the values",
    "--format: must be one of": "take one of the formats",
    "{flag}: must be a positive integer": "give 1 or more",
    "--temperature: must be 0": "give 0, or a positive number",
    "--top-k: must be 0": "give 0, or a positive integer",
    "--top-p: must be between": "give a number between 0 and 1",
    "--tokens: must be 1": "ask for at least one token",
    "--microbatches: must be": "choose a divisor",
    "{field}: {file}": "give a UTF-8 text file that can be read",
    "{path}: must be a mapping": "start from a file of configs/ and change its values",
    "{path}: cannot be read": "check the path",
    "{path}: is not YAML": "correct the line that the message names",
    "{path}: was torn or edited": "remove it, or write it again, as the message says",
    "{path}: must be the record of a node": "remove it, as the message says",
    "{first}; {remedy}": "write it again, as the message says",
    "{path}: must list": "write it again, as the message says",
    "needs either tp": "give a layout tp, or m and n",
    "{run.model.name}, layout": "correct that layout in the experiment file",
    "phase: must be one of": "take one of the phases",
    "rank: need 0 <=": "ask for a rank of the group",
    "need a GPTModel": "build the model with Megatron's GPT builder",
    "module {__name__}": "take one of the names in megatron_helix.__all__",
    "{failure.kind}: {failure.text}": "read where it was raised, which follows",
    "unit must be one of": "take one of the units, or leave the value in the file's own",
    "must be given where": "give it in the hardware file",
    "rank-by: must be one of": "take one of the names",
    "rank {rank} of {world_size}": "read the end of the log that the message names",
    "{path}: {key}:": "correct that key, or leave it out",
    "{$usage}": "call it as the message says",
    "needs a launch script": "name one after scripts/slurm.sbatch",
    "need Python 3.12 or 3.13": "install one and put it on PATH (Debian, Ubuntu: python3.12 and"
    " python3.12-venv)",
}


# Messages that are put together, by the expression that does it.
MADE = {
    r"'\n'.join(lines)": "{path}: {key}: {what it must be}, got {value}",
}

# Where a message comes from: the first part of its module's path, or scripts.
AREAS = {
    "planner": "helix plan, helix calibrate",
    "experiment": "helix run, report, compare, dag and launch",
    "verification": "helix run, report, compare, dag and launch",
    "report": "helix run, report, compare, dag and launch",
    "workflow": "helix run, report, compare, dag and launch",
    "fuzz": "helix fuzz",
    "run_config": "Model, hardware and experiment files",
    "machine": "Model, hardware and experiment files",
    "inference": "helix generate",
    "generate": "helix generate",
    "corpus": "helix data",
    "conversations": "helix data",
    "basics": "Files and folders",
    "launching": "Ranks",
    "scripts": "Scripts",
}
FLAGS = "Flags of a run"
SAID = r'(?:fail|echo(?= "error: [^$]))((?:\s+"[^"]*")+)'


class Message(NamedTuple):
    """An error message: its text, ``{expression}`` where a value goes, and what to do."""

    area: str
    text: str
    remedy: str | None


def messages() -> Iterator[Message]:
    """Every message to a user, of the package in the order of its modules, then of the scripts.

    Raises:
        ValueError: for an error whose text cannot be read from the code.
    """
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    }
    with_own = {node.name for tree in trees.values() for node in ast.walk(tree) if _own_text(node)}
    for path, tree in trees.items():
        area = AREAS.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), FLAGS)
        for text in (*_raised(tree, path, with_own), *_of_classes(tree)):
            yield Message(area, text, _remedy(text))
    for path in sorted((ROOT / "scripts").glob("*.s*")):
        for text in _of_script(path.read_text(encoding="utf-8").replace("\\\n", " ")):
            yield Message(AREAS["scripts"], text, _remedy(text))


def _of_script(source: str) -> Iterator[str]:
    """What a script says before it ends: ``fail ".."``, ``echo "error: .."``, ``${1:?..}``."""
    said = [" ".join(re.findall(r'"([^"]*)"', words)) for words in re.findall(SAID, source)]
    said += re.findall(r"\$\{1:\?([^}]*)\}", source)
    for text in said:
        yield re.sub(r"\$\w+", lambda name: f"{{{name[0]}}}", text.removeprefix("error: "))


def _raised(tree: ast.Module, path: Path, with_own: set[str]) -> Iterator[str]:
    """The texts of the errors that a module raises, but for those that word themselves."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        error = ast.unparse(node.exc.func)
        if not re.search("Error|Failed", error) or error in with_own:
            continue
        text = _text(node.exc.args[0]) if node.exc.args else None
        text = text or MADE.get(ast.unparse(node.exc.args[0]) if node.exc.args else "")
        if text is None:
            raise ValueError(f"{path}:{node.lineno}: no text to read; give one, or MADE an entry")
        yield text


def _of_classes(tree: ast.Module) -> Iterator[str]:
    """The texts of exceptions that word themselves."""
    return filter(None, (_own_text(node) for node in ast.walk(tree)))


def _own_text(node: ast.AST) -> str | None:
    """What the exception of this class says."""
    if isinstance(node, ast.ClassDef) and re.search("(Error|Failed)$", node.name):
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                return _text(call.args[0]) if call.args else None
    return None


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_part, node.values))
    return None


def _part(node: ast.expr) -> str:
    """Of a formatted string: words as they are, a value as its expression."""
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _remedy(text: str) -> str | None:
    for start, remedy in REMEDIES.items():
        if text.startswith(start):
            return remedy
    return text.rpartition("; ")[2] if "; " in text else None


def flags() -> str:
    """The helix flags, from their parser."""
    from megatron_helix.options.flags import add_helix_arguments

    parser = add_helix_arguments(argparse.ArgumentParser(add_help=False))
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        names = ", ".join(action.option_strings)
        value = f" {action.metavar}" if action.metavar else ""
        default = "" if action.default in (None, False) else f"`{action.default}`"
        rows.append(f"| `{names}{value}` | {default} | {action.help} |")
    return "\n".join(rows)


def commands() -> str:
    """The subcommands of ``helix`` and their options, from typer."""
    import typer.main

    from megatron_helix.cli import app

    command: Any = typer.main.get_command(app)
    parts = []
    for name, sub in command.commands.items():
        rows = [f"### helix {name}", "", str(sub.help).strip(), "", "| | |", "|---|---|"]
        for parameter in sub.params:
            names = ", ".join(getattr(parameter, "opts", ())) or parameter.name
            if parameter.param_type_name == "argument":
                names = str(parameter.name).upper()
            said = [getattr(parameter, "help", "") or "", _names(parameter.type_descriptor)]
            rows.append(f"| `{names}` | {' '.join(filter(None, said))} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _names(kind: Any) -> str:
    """What may be given, where that is one of some names."""
    return f"One of {', '.join(map(str, kind.choices))}." if kind.is_choice else ""


def errors() -> str:
    """Every message and its remedy, a table for each area."""
    areas: dict[str, set[str]] = {}
    for area, text, remedy in messages():
        # An expression of the code says less than the dots that stand for its value.
        shown = re.sub(r"\{[^{}]*\}", "…", text.removesuffix(f"; {remedy}"))
        advice = re.sub(r"\{[^{}]*\}", "…", remedy or "")
        row = f"| {_code(shown)} | {_code(advice) if '…' in advice else advice} |"
        areas.setdefault(area, set()).add(row)
    head = ["| message | what to do |", "|---|---|"]
    first = [FLAGS] if FLAGS in areas else []
    parts = [
        "\n".join([f"### {area}", "", *head, *sorted(areas[area])])
        for area in (*first, *sorted(areas.keys() - {FLAGS}))
    ]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', '/')}`" if text else ""


PARTS: dict[str, Callable[[], str]] = {"flags": flags, "commands": commands, "errors": errors}


def page(text: str) -> str:
    """The page with its parts made anew."""

    def made(mark: re.Match[str]) -> str:
        begin, part, end = mark.groups()
        return "\n".join([begin, "", PARTS[part](), "", end])

    return re.sub(
        r"^(<!-- from the code: (\w+) -->)$.*?^(<!-- end -->)$", made, text, flags=re.M | re.S
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))

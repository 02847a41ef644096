"""What ``mkdocs build`` reads from the code: pages' order, flags, commands and error messages.

A line ``<!-- from the code: NAME -->`` of a page is replaced by the function of that name.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_helix"
FIRST = ("index", "getting_started", "method", "flags", "exactness", "planner", "measuring")
LAST = ("design", "log", "changelog")
sys.path.insert(0, str(ROOT))

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
    "compare: the data of": "run both experiments on the same dataset",
    "compare: {first} and {second} have no run": "give models and layouts the same names in both",
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
    "--prompts: {file}": "give a UTF-8 text file that can be read",
    "{path}: must be a mapping": "start from a file of configs/ and change its values",
    "{path}: cannot be read": "check the path",
    "{path}: is not YAML": "correct the line that the message names",
    "needs either tp": "give a layout tp, or m and n",
    "{one.model.name}, layout": "correct that layout in the experiment file",
    "phase: must be one of": "take one of the phases",
    "rank: need 0 <=": "ask for a rank of the group",
    "need a GPTModel": "build the model with Megatron's GPT builder",
    "module {__name__}": "take one of the names in megatron_helix.__all__",
    "unit must be one of": "take one of the units, or leave the value in the file's own",
    "must be given where": "give it in the hardware file",
    "rank-by: must be one of": "take one of the names",
}


class Message(NamedTuple):
    """An error message: its text, ``{expression}`` where a value goes, and what to do."""

    error: str
    text: str
    remedy: str | None


def messages() -> Iterator[Message]:
    """Every message that the package raises to a user, in the order of the modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error = ast.unparse(node.exc.func)
                text = _text(node.exc.args[0]) if node.exc.args else None
                if text and re.search("Error|Failed", error):
                    yield Message(error, text, _remedy(text))


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]
            for part in node.values
        )
    return None  # made from other messages


def _remedy(text: str) -> str | None:
    _, mark, own = text.rpartition("; ")
    if mark:
        return own
    return next((remedy for start, remedy in REMEDIES.items() if text.startswith(start)), None)


def flags() -> str:
    """The helix flags, from their parser."""
    from megatron_helix.arguments import add_helix_arguments

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
            rows.append(f"| `{names}` | {getattr(parameter, 'help', '') or ''} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def errors() -> str:
    """Every message and its remedy."""
    rows = ["| message | what to do |", "|---|---|"]
    for text, remedy in sorted({(message.text, message.remedy) for message in messages()}):
        # An expression of the code says less than the dots that stand for its value.
        shown = re.sub(r"\{[^{}]*\}", "…", text.removesuffix(f"; {remedy}"))
        advice = re.sub(r"\{[^{}]*\}", "…", remedy or "")
        rows.append(f"| {_code(shown)} | {_code(advice) if '…' in advice else advice} |")
    return "\n".join(rows)


def _code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', '/')}`" if text else ""


MARKS: dict[str, Callable[[], str]] = {"flags": flags, "commands": commands, "errors": errors}


def on_config(config: Any) -> Any:
    """Pages in reading order; a page that no list names stands between."""
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    middle = sorted(names - {*FIRST, *LAST})
    order = [name for name in (*FIRST, *middle, *LAST) if name in names]
    config.nav = [f"{name}.md" for name in order]
    return config


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill in the marks."""
    return re.sub(
        r"^<!-- from the code: (\w+) -->$", lambda mark: MARKS[mark[1]](), markdown, flags=re.M
    )

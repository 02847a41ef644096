"""The documentation: it builds, its figures are current, and its commands and messages are so."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer.main
from megatron.training.arguments import add_megatron_arguments

from megatron_helix import cli, pretrain_gpt
from megatron_helix.experiment import config
from megatron_helix.options import arguments
from megatron_helix.options.flags import add_helix_arguments
from tests.covering import THOROUGH
from tests.script_module import script_module

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GONE = {"--helix-gather-by"}  # flags that only the log still names


def load(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    return script_module(f"docs/{name}.py")


from_code = load("from_code")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    flags = (tmp_path / "flags" / "index.html").read_text()
    assert all(f"--helix-{name}" in flags for name in ("m", "n", "exchange", "split", "metrics"))
    assert "helix launch" in flags


def test_the_figures_are_what_their_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "figures.py", tmp_path], check=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "figures").iterdir())
    for name in drawn:
        kept = (ROOT / "docs" / "figures" / name).read_text()
        assert (tmp_path / name).read_text() == kept, f"{name}: call python docs/figures.py"


@pytest.mark.parametrize("page", from_code.PAGES, ids=lambda page: page.name)
def test_what_pages_have_of_the_code_is_what_it_says(page: Path) -> None:
    assert from_code.page(page.read_text()) == page.read_text(), "call python docs/from_code.py"
    assert all(row in page.read_text() for row in ROWS[page.stem])


# What a reader of the repository finds there, without a site.
ROWS = {
    "flags": ("| `--helix-m M` |  |", "### helix launch", "| `--nproc-per-node` |"),
    "troubleshooting": ("### Flags of a run", "### helix data", "| `sources: must exist, and"),
}


def test_every_error_message_says_or_is_told_what_to_do() -> None:
    messages = list(from_code.messages())
    assert len(messages) > 100
    without = [message.text for message in messages if not message.remedy]
    assert not without, "give the message a remedy, or docs/from_code.py:REMEDIES an entry"
    page = from_code.errors()
    for message in messages:
        words = max(re.split(r"\{[^{}]*\}|`|\|", message.text.rpartition("; ")[0] or message.text))
        assert words in page


@pytest.mark.parametrize("text", ["words", "'no ' + names", "problem(flag)", ""])
def test_no_message_is_missed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raised error whose text cannot be read ends the build of the site."""
    (tmp_path / "new.py").write_text(f"def check():\n    raise ValueError({text})\n")
    monkeypatch.setattr(from_code, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match=r"new\.py:2: no text to read"):
        list(from_code.messages())


def test_errors_that_word_themselves_and_those_of_scripts_are_read() -> None:
    texts = " | ".join(message.text for message in from_code.messages())
    for words in (
        "of {world_size} {how} (exit code {exitcode})",  # an exception's own __init__
        "{what it must be}",  # pydantic's, put together
        "must be the root of a Megatron-LM checkout",  # fail "..." "..."
        "need Python 3.12 or 3.13 with its venv module; none is here",  # echo "error: ..."
        "needs a launch script",  # ${1:?...}
    ):
        assert words in texts


def test_no_remedy_is_left_over() -> None:
    texts = [message.text for message in from_code.messages()]
    unused = [start for start in from_code.REMEDIES if not any(t.startswith(start) for t in texts)]
    assert not unused


class Command(NamedTuple):
    """A command line of a page, and what its comment says it takes or needs.

    What bears such a note is not run here, but parsed by what would run it; everything else runs.
    """

    page: str
    line: str
    note: str | None

    def starts(self, other: "Command") -> bool:
        """Whether the other is this one, perhaps with more arguments."""
        mine, words = self.line.split(), other.line.split()
        return words[: len(mine)] == mine


def commands(page: Path) -> Iterator[Command]:
    """The command lines of a page's ``bash`` blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        noted = re.fullmatch(r"(.*?)\s+# ((?:takes|needs) .+)", line)
        yield Command(page.name, *noted.groups()) if noted else Command(page.name, line, None)


COMMANDS = [command for page in PAGES for command in commands(page)]
NOTED = [command for command in COMMANDS if command.note]
TO_RUN = [one for one in COMMANDS if not any(noted.starts(one) for noted in NOTED)]
TO_PARSE = [one for one in COMMANDS if one not in TO_RUN]


def waiting() -> Iterator[Command]:
    """Of the commands to run those that the fast suite only parses.

    Each with no flag that one before of the same words has not, and what another test measures.
    """
    seen: list[tuple[list[str], set[str]]] = []
    for one in TO_RUN:
        words = one.line.partition("  #")[0].split()
        flags = {word for word in words if word.startswith("--")}
        known = any(words[:2] == before and flags <= those for before, those in seen)
        if known or words[:2] == ["helix", "calibrate"]:  # tests/planner/test_calibrate.py
            yield one
        seen.append((words[:2], flags))


WAITING = list(waiting())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the repository, with no ``runs`` yet; the commands run in it, in order."""
    here = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, here / name)
    (here / ".venv").symlink_to(sys.prefix)
    return here


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, marks=THOROUGH if one in WAITING else ()) for one in TO_RUN],
    ids=lambda one: f"{one.page}: {one.line[:60]}",
)
def test_a_command_of_the_documentation_runs(clone: Path, command: Command) -> None:
    ran = subprocess.run(
        ["bash", "-c", command.line],
        cwd=clone,
        env={**os.environ, "PATH": os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]


@pytest.mark.parametrize(
    "command",
    [*TO_PARSE, *(one for one in WAITING if one.line.startswith(("bash ", "helix ")))],
    ids=lambda one: f"{one.page}: {one.line[:60]}",
)
def test_a_command_that_takes_long_or_more_can_be_called(
    clone: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    words = expanded(command.line.partition("  #")[0])
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    name = Path(words[0]).name
    check = CHECKS.get(name)
    assert check, f"{command.page}: {name} is not a command that this test knows how to try"
    check(words[1:])


def test_a_note_is_for_what_a_test_cannot_run() -> None:
    reasons = "minutes|hour|GPU|Slurm|docker|nvcc|checkout|packages|that model|that experiment|both"
    assert not [one for one in NOTED if not re.search(reasons, one.note or "")]
    assert len(TO_RUN) > 20


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    folders = "benchmarks|configs|docs|patches|requirements|scripts|tests"
    is_log = page.name == "log.md"  # history, which names what was called so then
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)", prose(page)):
        assert is_log or (ROOT / name).exists(), name
    parser = add_helix_arguments(argparse.ArgumentParser())
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert known.isdisjoint(GONE)
    named = set(re.findall(r"--helix-[a-z-]*[a-z]", page.read_text()))
    assert named <= (known | GONE if is_log else known)
    groups: Any = typer.main.get_command(cli.app)
    assert set(re.findall(r"`helix ([a-z]+)", prose(page))) <= set(groups.commands)


def expanded(line: str) -> list[str]:
    """The words of a command; files that a ``$(command)`` names are expanded by the shell."""
    if "$(" not in line:
        return shlex.split(line)
    words = ["bash", "-c", f"printf '%s\\n' {line}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def try_script(words: list[str]) -> None:
    """A script is there and parses; a launch script prints its command."""
    script = ROOT / words[0]
    subprocess.run(["bash", "-n", script], check=True)
    if "--dry-run" in words:
        launched = re.search(r"^exec (helix launch .*)$", script.read_text(), re.MULTILINE)
        assert launched
        line = launched[1].replace('"$config"', "configs/experiments/seed_16gpu.yaml")
        try_helix([*shlex.split(line)[1:-1], *words[1:]])
    if script.name == "quickstart.sh":
        try_helix(["run", "configs/experiments/quickstart.yaml", "--out", "runs/quickstart"])


def try_helix(words: list[str]) -> None:
    """The command line parses, its files exist, and flags that go on to a run are accepted."""
    command: Any = typer.main.get_command(cli.app)
    if words == ["--version"]:
        return
    sub = command.commands[words[0]]
    context = sub.make_context(words[0], list(words[1:]))
    experiment = context.params.get("experiment")
    if experiment:
        config.load(Path(experiment))
    for name in ("model", "hardware"):
        if isinstance(context.params.get(name), Path):
            assert (ROOT / context.params[name]).exists()
    for source in context.params.get("sources") or ():
        assert (ROOT / source).exists()
    if words[0] in ("pretrain", "generate"):
        try_flags(list(context.args), context.params["nproc_per_node"])


def try_torchrun(words: list[str]) -> None:
    """The flags after the entry point are accepted."""
    entry = words.index("-m") + 1
    ranks = int(words[words.index("--nproc-per-node") + 1])
    if words[entry] == "megatron_helix.cli":
        assert words[entry + 1] == "generate"
        try_helix(["generate", "--nproc-per-node", str(ranks), *words[entry + 2 :]])
    else:
        assert words[entry] == "megatron_helix.pretrain_gpt"
        try_flags(words[entry + 1 :], ranks)


def try_flags(flags: list[str], world_size: int) -> None:
    """Helix completes the flags, and Megatron's parser knows all of them."""
    while "--data-path" in flags:  # what an earlier command of the page makes
        at = flags.index("--data-path")
        del flags[at : at + 2]
    completed = arguments.complete(["--helix-device", "cpu", *flags], world_size)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parsed, unknown = pretrain_gpt.flags_beside()(parser).parse_known_args(completed)
    assert not unknown
    size = parsed.tensor_model_parallel_size * parsed.pipeline_model_parallel_size
    assert world_size % size == 0


def try_python(words: list[str]) -> None:
    """The script is there."""
    assert (ROOT / words[0]).exists()


def try_pip(words: list[str]) -> None:
    """What is installed is this package, with an extra that it has."""
    assert words[0] == "install"
    target = words[-1]
    assert target.startswith(".")
    extra = re.fullmatch(r"\.\[(\w+)\]", target)
    assert target == "." or (extra and f'"{extra[1]}": [' in (ROOT / "setup.py").read_text())


def try_docker(words: list[str]) -> None:
    """The recipe is there."""
    assert (ROOT / words[words.index("--file") + 1]).exists()


def try_sbatch(words: list[str]) -> None:
    """The batch script parses, and so does what it starts."""
    try_script(words[:1])
    try_script([words[1], "--dry-run", *words[2:]])


CHECKS = {
    "bash": try_script,
    "helix": try_helix,
    "torchrun": try_torchrun,
    "python": try_python,
    "pip": try_pip,
    "docker": try_docker,
    "sbatch": try_sbatch,
}


def test_the_readme_is_short_and_names_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 125
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link

"""What the pages for contributors name is there: paths, modules, functions, ``file:symbol``."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_helix"
PAGES = [ROOT / "docs" / name for name in ("contributing.md", "design.md")]
# A path is one of the repository, of the package, or of the folder that a recipe is about.
FOLDERS = (ROOT, PACKAGE, PACKAGE / "options" / "features")
PATH = re.compile(r"\.?[\w./-]+(?:/|\.(?:py|sh|yaml|md|j2))")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
WORD = re.compile(r"[A-Za-z_]\w*")
# TransformerEngine's protocol, which is followed and not imported; a weight, and what is grepped.
OTHERS = ("DistributedWeight", "W_o", "self.plan.exchange")


def named(page: Path) -> list[str]:
    """What stands in backticks, but for blocks of code; a new file's NAME is none yet."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = (" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose))
    return sorted({words for words in found if "NAME" not in words})


def located(path: str) -> Path | None:
    """The file or folder of that name."""
    return next((one / path for one in FOLDERS if (one / path).exists()), None)


def of_module(tree: ast.Module) -> set[str]:
    """What a module defines, members of classes with their class, and imports."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        names = assigned(node)
        found |= names
        if isinstance(node, ast.ClassDef):
            members = {name for inner in node.body for name in assigned(inner)}
            found |= {f"{node.name}.{name}" for name in members}
    return found


def assigned(node: ast.stmt) -> set[str]:
    """The names that one statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@cache
def symbols(path: Path) -> frozenset[str]:
    """:func:`of_module` of a file."""
    return frozenset(of_module(ast.parse(path.read_text())))


@cache
def words_of_the_code() -> frozenset[str]:
    """Every name that code of the package uses, and the words of its texts but for docstrings."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set() if id(node) in said else set(WORD.findall(node.value))
            for field in ("name", "id", "attr", "arg", "asname"):
                found |= set(WORD.findall(str(getattr(node, field, None) or "")))
    return frozenset(found | {path.stem for path in PACKAGE.rglob("*") if path.suffix != ".pyc"})


def missing(words: str) -> str:
    """What is wrong with a name; nothing where it is there or is no name of the code."""
    path, colon, symbol = words.partition(":")
    if colon and symbol and PATH.fullmatch(path):
        file = located(path)
        if file is None:
            return f"no file {path}"
        if file.suffix == ".py":
            return "" if symbol in symbols(file) else f"no {symbol} in {path}"
        return "" if symbol in file.read_text() else f"no {symbol} in {path}"
    if PATH.fullmatch(words):
        return "" if located(words) else f"no {words}"
    words = words.removesuffix("()")
    if words.startswith("torch.") or words in OTHERS:
        return ""
    if DOTTED.fullmatch(words):
        owner, _, member = words.rpartition(".")
        files = [*PACKAGE.rglob("*.py")]
        known = any(words in symbols(file) for file in files)
        known |= any(member in symbols(file) for file in files if file.stem == owner)
        return "" if known else f"no class or module {owner} with {member}"
    if WORD.fullmatch(words) and words not in words_of_the_code():
        return f"no {words} in the package"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_for_contributors_names_is_there(page: Path) -> None:
    assert len(named(page)) > 40
    assert not [fault for words in named(page) if (fault := missing(words))]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("layers/linear.py:qkv_to_whole_heads", ""),
        ("layers/attention.py:qkv_to_whole_heads", "no qkv_to_whole_heads in"),
        ("exchange/activation.py", "no exchange/activation.py"),
        ("HelixGroups.home", ""),
        ("HelixGroups.away", "no class or module HelixGroups with away"),
        ("layer_spec.helixify", ""),
        ("helixifies", "no helixifies in the package"),
    ],
)
def test_a_name_that_is_gone_is_seen(words: str, fault: str) -> None:
    assert missing(words).startswith(fault) if fault else not missing(words)


def test_the_map_of_the_readme_is_the_repository() -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"^## Map\n+```\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert found
    rooms = set()
    for line in found[1].splitlines()[1:]:
        # Names, of folders at the top, then what they are.
        words = re.match(r"( *)((?:[\w/]+ {1,2})*[\w/]+)(?: {2,}|$)", line)
        assert words, line
        above = PACKAGE if words[1] else ROOT
        for word in words[2].split():
            if not words[1] and not word.endswith("/"):
                break
            assert (above / word).exists() or (above / f"{word}.py").exists(), word
            rooms |= {word.removesuffix("/")} if words[1] else set()
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == there | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}

"""The package: what it builds, what an installation of the wheel brings, and its public names."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import megatron_helix

ROOT = Path(__file__).parents[1]


def run(*words: object, **env: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        cwd=env.get("PWD", ROOT),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("dist")
    backend = "from setuptools import build_meta as b; import sys; b.build_{}(sys.argv[1])"
    copy = folder / "source"
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in tracked:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", backend.format("sdist"), folder, PWD=str(copy))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", backend.format("wheel"), folder, PWD=str(unpacked))
    return folder


def test_the_sdist_holds_what_the_repository_is_made_of(built: Path) -> None:
    (unpacked,) = (built / "unpacked").iterdir()
    for name in ("setup.py", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml"):
        assert (unpacked / name).is_file(), name
    for name in ("configs", "docs", "patches", "requirements", "scripts", "tests"):
        assert (unpacked / name).is_dir(), name


def test_the_wheel_is_typed_and_holds_the_package_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "megatron_helix/py.typed" in names
    assert all(name.startswith(("megatron_helix/", "megatron_helix-")) for name in names)
    files = [p for kind in ("*.py", "*.j2") for p in (ROOT / "megatron_helix").rglob(kind)]
    assert {file.suffix for file in files} == {".py", ".j2"}
    assert {str(file.relative_to(ROOT)) for file in files} <= set(names)


def test_the_wheel_installs_into_an_empty_environment(built: Path, tmp_path: Path) -> None:
    """Its dependencies, 5 GB, are lent by the environment of the tests."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    helix = tmp_path / "env" / "bin" / "helix"
    at = str(tmp_path)
    where = run(python, "-c", "import megatron_helix as m; print(m.__file__)", PWD=at)
    assert Path(where.strip()).is_relative_to(site)
    assert run(helix, "--version", PWD=at) == f"megatron-helix {megatron_helix.__version__}\n"
    completion = run(helix, PWD=at, _HELIX_COMPLETE="source_bash")
    assert "_HELIX_COMPLETE=complete_bash" in completion


def imported(module: Path) -> set[str]:
    """The modules and packages of ours, dotted, that a module imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_helix":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_helix."):
            inside = (node.module or "").partition(".")[2]
            names |= {f"{inside}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.startswith("megatron_helix.")]
            names |= {name.partition(".")[2] for name in ours}
    return names - {"__version__"}


def floor_of(parts: tuple[str, ...], floors: list[str]) -> str:
    """The floor of a module: the longest path of a folder that the table names, or itself."""
    paths = ["/".join(parts[: i + 1]).removesuffix(".py") for i in range(len(parts))]
    return next((path for path in reversed(paths) if path in floors), paths[0])


def test_a_module_imports_only_from_its_floor_and_those_below() -> None:
    """A row of the table is a floor, so two folders cannot import each other."""
    package = ROOT / "megatron_helix"
    design = (ROOT / "docs" / "design.md").read_text()
    table = design.partition("| floor |")[2].splitlines()
    floors = [found[1] for row in table if (found := re.match(r"\| `([a-z_/]+?)/?` \|", row))]
    there = {path.name for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    ours = {name.removesuffix(".py") for name in there if not name.startswith("_")}
    top = [floor for floor in floors if "/" not in floor]
    assert sorted(top) == sorted(ours), "docs/design.md's table names every floor, once"
    seen = 0
    for module in package.rglob("*.py"):
        here = floor_of(module.relative_to(package).parts, floors)
        for other in imported(module) if here != "__init__" else ():
            below = floor_of(tuple(other.split(".")), floors)
            assert floors.index(below) <= floors.index(here), f"{module} imports {other}"
            seen += 1
    assert seen > 100


def test_the_readmes_map_names_every_folder_and_door() -> None:
    package = ROOT / "megatron_helix"
    readme = (ROOT / "README.md").read_text().partition("## Map")[2].partition("\n## ")[0]
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    missing = [name for name in there if name[0] != "_" and not re.search(rf"\b{name}\b", readme)]
    assert not missing


def test_importing_the_package_loads_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_helix; print(*{'torch', 'megatron'} & set(sys.modules))"
    assert run(sys.executable, "-c", code).strip() == ""


def test_the_public_names_are_there_and_no_others() -> None:
    from megatron_helix import plugin
    from megatron_helix.layers import layer_spec
    from megatron_helix.partition import layout

    assert megatron_helix.enable is plugin.enable
    assert megatron_helix.HelixLayout is layout.HelixLayout
    assert megatron_helix.helixify is layer_spec.helixify
    assert set(megatron_helix.__all__) <= set(dir(megatron_helix))
    assert all(name in (megatron_helix.__doc__ or "") for name in megatron_helix.__all__[2:])
    with pytest.raises(AttributeError, match="has no attribute 'enabled'"):
        _ = megatron_helix.enabled  # pyright: ignore[reportAttributeAccessIssue]

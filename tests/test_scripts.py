"""Launch scripts: the torchrun line they print, checked as a rank would check it."""

import ast
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_helix.experiment import config, torchrun
from megatron_helix.options import arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
TOOLS = Path(sys.prefix) / "bin"  # of this environment, which need not be active
LAUNCHERS = ("dense_baseline", "dense_helix", "moe_baseline", "moe_helix")
RENDEZVOUS = ("--rdzv-endpoint", "node0:29500")
EXPERIMENT = config.load(ROOT / "configs" / "experiments" / "seed_16gpu.yaml")


def call(*words: object, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the helix of this environment, and with ``path`` before anything else."""
    places = [str(path)] if path else []
    places += [str(TOOLS), os.environ["PATH"]]
    return subprocess.run(
        ["bash", *map(str, words)],
        env={**os.environ, **env, "PATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_passes_shellcheck() -> None:
    scripts = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch"), ROOT / ".ci" / "run"])
    found = subprocess.run(
        [TOOLS / "shellcheck", *scripts], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert found.returncode == 0, found.stdout


def is_program(file: Path) -> bool:
    """Whether a file is to be called, and not imported."""
    is_script = file.suffix == ".py" and "__main__" in file.read_text()
    return is_script or file.suffix in (".sh", ".sbatch")


FILES = [file for name in ("scripts", "examples") for file in sorted((ROOT / name).rglob("*"))]
PROGRAMS = [file for file in FILES if is_program(file)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.name)
def test_a_program_says_what_it_does_and_does_nothing(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a copy, without the environment that a script would make or call."""
    copy = tmp_path / program.parent.name
    shutil.copytree(program.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if program.suffix == ".py":  # here, where torch has been imported
        begins = ast.get_docstring(ast.parse(program.read_text()))
        monkeypatch.setattr(sys, "argv", [str(copy / program.name), "--help"])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.syspath_prepend(str(copy))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(copy / program.name), run_name="__main__")
        for name in [path.stem for path in copy.glob("*.py")]:
            sys.modules.pop(name, None)
        code, said = ended.value.code, capsys.readouterr().out
    else:
        begins = program.read_text().splitlines()[1].removeprefix("# ")
        called = subprocess.run(
            ["bash", copy / program.name, "--help"],
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        code, said = called.returncode, called.stdout
        assert called.stderr == ""
    assert not code
    assert begins
    assert " ".join(said.split()).find(" ".join(begins.split()[:5])) >= 0
    assert sorted(tmp_path.rglob("*")) == before


def test_the_environment_is_made_of_a_word_that_is_known(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    refused = call(tmp_path / "scripts" / "env.sh", "develop")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: scripts/env.sh: must be called with dev or without")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


# Compiled as pip does: a package's own warnings come with it, not at the first import.
GET_UV, BY_UV = "pip install --quiet uv", "uv pip install --quiet --compile-bytecode"


@pytest.mark.parametrize(
    ("uv", "settings", "asked"),
    [
        ("exit 0", "", [GET_UV, BY_UV]),
        ("exit 1", "", [GET_UV, BY_UV, "pip install"]),
        ("exit 0", "global.index-url='https://here'", ["pip install"]),
    ],
    ids=["uv", "pip, where uv cannot", "pip, which has an index of its own"],
)
def test_the_environment_is_installed_by(
    tmp_path: Path, uv: str, settings: str, asked: list[str]
) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    tools, calls = tmp_path / ".venv" / "bin", tmp_path / "calls"
    tools.mkdir(parents=True)
    python = f"""[[ "$1 $2" == "-m pip" ]] || exec {sys.executable} "$@"
        [[ $3 != install ]] || echo "${{@:2}}" >> {calls}
        [[ $3 != config ]] || echo "{settings}" """
    for name, does in (("python", python), ("uv", f'echo "uv $*" >> {calls}; {uv}')):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tools / name).chmod(0o755)
    made = call(tmp_path / "scripts" / "env.sh", "dev")
    assert made.returncode == 0, made.stderr
    lines = calls.read_text().splitlines()
    assert all(line.startswith(begin) for line, begin in zip(lines, asked, strict=True))
    assert lines[-1].endswith("--constraint requirements/cpu.txt --editable .[dev]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ouT", "runs/own"], "must be called with --out DIR or without a word, got --ouT; corr"),
        (["runs/own"], "must be called with --out DIR or without a word, got runs/own; correct"),
        (
            ["--out", "runs/own", "more"],
            "must be called with --out DIR or without a word, got more",
        ),
        (["--json", "--out"], "--out must have a value; add it"),
    ],
)
def test_the_quickstart_refuses_a_word_before_it_makes_the_environment(
    tmp_path: Path, words: list[str], said: str
) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    refused = call(tmp_path / "scripts" / "quickstart.sh", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: scripts/quickstart.sh: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def test_the_quickstart_hands_on_what_helix_run_takes(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / "scripts" / "env.sh").write_text("")
    helix = tmp_path / ".venv" / "bin" / "helix"
    helix.parent.mkdir(parents=True)
    helix.write_text('#!/bin/sh\necho "$@"\n')
    helix.chmod(0o755)
    words = ["--out", "runs/own", "--json", "--hardware=here.yaml"]
    called = call(tmp_path / "scripts" / "quickstart.sh", *words)
    assert called.returncode == 0, called.stderr
    assert called.stdout.split()[-len(words) :] == words


def flags_of(line: str) -> list[str]:
    """Megatron's flags in a torchrun line."""
    words = shlex.split(line)
    entry = words.index("megatron_helix.pretrain_gpt")
    assert words[0] == "torchrun"
    assert words[entry - 1] == "-m"
    return words[entry + 1 :]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launch_script_prints_a_line_that_every_rank_accepts(name: str) -> None:
    printed = call(SCRIPTS / f"{name}.sh", "--dry-run", "--train-iters", "3")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("torchrun --standalone --nproc-per-node 16 -m ")
    flags = flags_of(printed.stdout)
    assert ("--helix-m" in flags) == name.endswith("helix")
    assert ("--num-experts" in flags) == name.startswith("moe")
    assert "--fp16" in flags
    assert flags[-2:] == ["--train-iters", "3"]  # a user's flag comes last, and wins
    # The device is the one thing that this machine lacks.
    flags[flags.index("--helix-device") + 1] = "cpu"
    degree = "--tensor-model-parallel-size"
    completed = arguments.complete(flags, 16)
    assert completed[completed.index(degree) + 1] == ("16" if name.endswith("helix") else "8")


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("layout", ["tp8_pp2", "helix_4x4"])
def test_two_nodes_meet_at_the_rendezvous(model: str, layout: str) -> None:
    nodes = torchrun.Nodes(count=2, rendezvous="node0:29500")
    words = torchrun.command(EXPERIMENT, model, layout, nodes=nodes, data="corpus")
    assert words[: words.index("-m")] == [
        *("torchrun", "--nnodes", "2", "--rdzv-id", "helix", "--rdzv-backend", "c10d"),
        *(*RENDEZVOUS, "--nproc-per-node", "8"),
    ]
    assert words[-4:] == ["--data-path", "corpus", "--split", "100,0,0"]


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        (("dens", "helix_4x4"), r"^MODEL: must be one of dense, moe, got 'dens'$"),
        (("moe", "tp99"), r"^LAYOUT: must be one of tp8_pp2, helix_4x4, .*, got 'tp99'$"),
    ],
)
def test_an_unknown_name_is_refused(arguments_: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchrun.command(EXPERIMENT, *arguments_)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (torchrun.Nodes(count=3), r"^--nnodes: must be a positive divisor of .* \(16\), got 3"),
        (torchrun.Nodes(count=2), r"^--rdzv-endpoint: must be HOST:PORT of one node"),
    ],
)
def test_nodes_that_cannot_hold_the_ranks_are_refused(nodes: torchrun.Nodes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchrun.command(EXPERIMENT, "dense", "helix_4x4", nodes=nodes)


def test_slurm_starts_the_script_on_every_node(tmp_path: Path) -> None:
    """With Slurm's own commands answered by what they answer in an allocation of two nodes."""
    for name, answer in (("scontrol", "printf 'gpu7\\ngpu8\\n'"), ("srun", 'exec "$@" --dry-run')):
        command = tmp_path / name
        command.write_text(f"#!/usr/bin/env bash\n{answer}\n")
        command.chmod(0o755)
    printed = call(
        *(SCRIPTS / "slurm.sbatch", SCRIPTS.relative_to(ROOT) / "moe_helix.sh"),
        path=tmp_path,
        SLURM_JOB_NODELIST="gpu[7-8]",
        SLURM_JOB_NUM_NODES="2",
    )
    assert printed.returncode == 0, printed.stderr
    assert "--nnodes 2 --rdzv-id helix --rdzv-backend c10d --rdzv-endpoint gpu7:29500" in (
        printed.stdout
    )
    assert "--num-experts 8" in printed.stdout


def test_the_container_has_the_tested_torch_and_what_it_copies() -> None:
    recipe = (SCRIPTS / "Dockerfile").read_text()
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if "==" in line
    )
    assert f"pytorch/pytorch:{pinned['torch']}-cuda13" in recipe
    copied = [line.split()[1:-1] for line in recipe.splitlines() if line.startswith("COPY")]
    assert copied
    assert all((ROOT / source).exists() for sources in copied for source in sources)

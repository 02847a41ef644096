"""A user's mistake ends every command in one line and code 2; a fault of the program in a trace."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_helix import cli, corpus, pretrain_gpt, workflow
from megatron_helix.basics.errors import UserError
from megatron_helix.planner import search
from megatron_helix.upstream import cpu_device
from tests.experiment_case import DOCUMENT, experiment

ROOT = Path(__file__).parents[2]
LINE = "error: --helix-m: must be a positive integer, got 0"

# A rank of torchrun's whose first rank is the slowest, so that another one is the first to end.
RANK = """
import os, sys, time
from megatron_helix.basics import errors
from megatron_helix import pretrain_gpt
first, errors.PATIENCE_S, mistaken, *flags = sys.argv[1:]
errors.PATIENCE_S = float(errors.PATIENCE_S)
if os.environ["RANK"] == "0":
    time.sleep(float(first))
if os.environ["RANK"] in mistaken:
    flags += ["--helix-m", "0"]
pretrain_gpt.train = lambda flags: time.sleep(1000)
pretrain_gpt.main(["--helix-device", "cpu", "--helix-m", "1", "--helix-n", "1", *flags])
"""


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two of torchrun's ranks, each of them :data:`RANK`."""
    (folder / "rank.py").write_text(RANK)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", folder / "rank.py", *words),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_line_comes_though_another_rank_is_the_first_to_end(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "3", "60", "01")
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "must be a positive" in line]
    assert said[0] == LINE  # once from rank 0
    assert LINE in said[-1]  # and once in what torchrun says of it in the end
    assert len(said) == 2
    assert ended.stderr.splitlines()[-2] == said[-1]


def test_a_rank_that_is_mistaken_alone_says_so_itself(tmp_path: Path) -> None:
    """Rank 0 is well, and speaks for nobody: a node without a GPU, say."""
    ended = torchrun(tmp_path, "0", "1", "1")
    assert ended.returncode == 1
    assert "error: rank 1: --helix-m: must be a positive integer, got 0" in ended.stderr


CONFIGS = ROOT / "configs"
QUICK = str(CONFIGS / "experiments" / "quickstart.yaml")
PLAN = (
    *("plan", "--model", str(CONFIGS / "models" / "dense.yaml")),
    *("--hardware", str(CONFIGS / "hardware" / "h100_2x8_ib.yaml")),
)
CPU_FLAGS = ("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4")
TINY = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "1"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
    *("--lr", "1e-3", "--train-iters", "1", "--eval-iters", "0"),
)

MISTAKES = [
    ("run missing.yaml --out out", "missing.yaml: cannot be read: No such file"),
    ("run binary --out out", "binary: is not YAML: "),
    ("run torn.yaml --out out", "torn.yaml: is not YAML: "),
    (
        "run twice.yaml --out out",
        "twice.yaml: is not YAML: line 2: the key 'layouts' is given twice; leave one away",
    ),
    ("run small.yaml --out file", "--out: file must be a folder that can be made: File"),
    ("run small.yaml --out file/out", "--out: file/out must be a folder that can be made: Not a"),
    ("run typed.yaml --out out", "tiny, layout tp2_pp2: --helix-m: invalid int value: 'x'; corr"),
    ("report missing", "missing: must hold a finished experiment, and experiment.json is missing"),
    ("compare missing missing", "missing: must hold a finished experiment"),
    ("dag wide.yaml", "tiny, layout wide: tp (or m x n) x pp x cp: must be a positive divisor of"),
    ("launch wide.yaml tiny wide --dry-run", "tiny, layout wide: tp (or m x n) x pp x cp: must be"),
    ("launch wide.yaml tiny odd --dry-run", "tiny, layout odd: micro_batch x data-parallel ranks"),
    ("dag small.yaml --model tiny", "--model, --layout: say what --deployment draws, which was"),
    ("dag small.yaml --deployment --model x", "--model: must be one of tiny, got 'x'"),
    ("data missing --out out/data", "sources: must exist, and missing does not; check the path"),
    ("data binary --out out/data", "sources: need UTF-8 text, and found none in binary; name"),
    ("data text --out file/data", "--out: file must be a folder that can be made: File"),
    ("data text --out /proc/data", "--out: /proc must be a folder to write in: "),
    ("data text --sft --out /proc/data", "--out: /proc must be a folder to write in: "),
    ("calibrate --device cpu --out /proc/x", "--out: /proc must be a folder to write in: "),
    ("fuzz --json /proc/x", "--json: /proc must be a folder to write in: "),
    ("fuzz --json file/x", "--json: file must be a folder that can be made: File"),
    ("data text --out .", "--out: must be the prefix of files, got the folder .; add a name to it"),
    ("data . --pattern /a --out out/data", "--pattern: must be a pattern of names in a folder"),
    ("data . --pattern a**b --out out/data", "--pattern: must be a pattern of names in a folder"),
    ("pretrain --nproc-per-node 2 -- --helix-m 0 --helix-n 1", LINE.removeprefix("error: ")),
    ("pretrain --nproc-per-node 2 -- --helix-m x", "--helix-m: invalid int value: 'x'; correct"),
    (
        "pretrain --nproc-per-node 2 -- --helix-exchnge weights",
        "--helix-exchnge: must be a flag of Megatron's or helix's, and is none; is --helix-ex",
    ),
    (
        f"launch {QUICK} tiny_dense helix_4x4 --dry-run --num-layer 2",
        "--num-layer: must be a flag of Megatron's or helix's, and is none; is --num-layers",
    ),
    ("generate --load . --prompt a -- --xyzzy", "--xyzzy: must be a flag of Megatron's or helix's"),
    ("pretrain --nproc-per-node 2 -- TINY --load missing", "--load: must be a folder that Megatro"),
    ("pretrain --nproc-per-node 2 -- TINY --save /proc/x", "--save: /proc/x must be a folder that"),
    ("pretrain --nproc-per-node 2 -- TINY --helix-metrics file", "--helix-metrics: file must be a"),
    ("pretrain --nproc-per-node 2 --logs file", "--logs: file must be a folder that can be made"),
    (f"launch {QUICK} tiny dense", "MODEL: must be one of tiny_dense, tiny_moe, got 'tiny'"),
    (
        f"launch {QUICK} tiny_dense helix_4x4 --helix-m 3",
        "--helix-m x --helix-n (x pipeline x context parallel size): must",
    ),
    (f"launch {QUICK} tiny_dense helix_4x4 --helix-m x", "--helix-m: invalid int value: 'x'"),
    (f"launch {QUICK} tiny_dense helix_4x4 --nnodes 3", "--nnodes: must be a positive divisor of"),
    (f"launch {QUICK} tiny_dense helix_4x4 --load x", "--load: must be a folder that Megatron sav"),
    (f"launch {QUICK} tiny_dense helix_4x4 --save file", "--save: file must be a folder that can "),
    (f"launch {QUICK} tiny_dense helix_4x4 --data x", "--data-path: x must be the prefix of a"),
    ("calibrate --device cpu --out .", "--out: must be a file to write, got the folder .; name"),
    ("calibrate --device cpu --out file/x", "--out: file must be a folder that can be made: File"),
    ("generate --load missing --prompt a", "--load: must be a folder that Megatron saved"),
    ("generate --load . --prompt a --top-p 2", "--top-p: must be between 0 (off) and 1, got 2.0"),
    ("generate --load .", "--prompt: needs at least one; give --prompt TEXT or --prompts FILE"),
    ("PLAN --layout tp=0,micro_batch=4", "layout: tp: Input should be greater than 0, got 'tp=0"),
    (
        "PLAN --layout nothing",
        "layout: nothing must be a name of the table or KEY=VALUE, got",
    ),
    ("PLAN_1 --devices 64", "--devices: 2 x H200 has 2 devices in its one node, got 64"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the mistakes are about; the folder that commands are called in."""
    flags = {**DOCUMENT, "flags": ["--helix-m", "x"]}
    (tmp_path / "small.yaml").write_text(json.dumps(DOCUMENT))  # JSON is YAML
    (tmp_path / "typed.yaml").write_text(json.dumps(flags))
    wide = [
        {"name": "wide", "m": 4, "n": 2, "micro_batch": 1},
        {"name": "odd", "m": 2, "n": 2, "micro_batch": 3},
    ]
    stretched = {**DOCUMENT, "layouts": wide, "claims": [], "outlook": None}
    (tmp_path / "wide.yaml").write_text(json.dumps(stretched))
    (tmp_path / "torn.yaml").write_text(json.dumps(DOCUMENT)[:-3])
    (tmp_path / "twice.yaml").write_text("layouts: []\nlayouts: []\n")
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    (tmp_path / "text").write_text("text")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """What the ``helix`` command does, in this process."""
    monkeypatch.setattr(sys, "argv", ["helix", *words])
    cli.main()


@pytest.mark.parametrize(("line", "said"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_makes_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    line: str,
    said: str,
) -> None:
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("torchrun was started"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    words = [*PLAN, *line.split()[1:]] if line.startswith("PLAN") else line.split()
    if "TINY" in words:
        at = words.index("TINY")
        words[at : at + 1] = TINY
    if line.startswith("PLAN_1"):
        words[4] = str(CONFIGS / "hardware" / "h200_2.yaml")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, words)
    assert ended.value.code == 2
    told = capfd.readouterr()
    (only,) = told.err.splitlines()
    assert only.startswith(f"error: {said}")
    assert told.out == ""
    assert sorted(folder.rglob("*")) == before


def test_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    named = [{**DOCUMENT["layouts"][0], "name": name} for name in ("tp2_pp2", "tp2_pp2-prefill")]
    with pytest.raises(
        UserError, match=r"^models, layouts: tiny-tp2_pp2-prefill would be the folder of two runs; "
    ):
        workflow.run(experiment(layouts=named, claims=[]), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_the_cpu_device_beside_a_gpu_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_device, "is_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, ["pretrain", "--nproc-per-node", "2"])
    assert ended.value.code == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("error: the CPU device was asked for on a machine with a GPU: use")


def test_checks_of_what_a_user_gives_raise_the_error_of_a_users_mistake() -> None:
    """A plain ValueError is the program's own: the modules that raise one of those are named."""
    own = {"planner/traffic.py", "experiment/dag.py"}
    package = Path(cli.__file__).parent
    found = {
        str(module.relative_to(package))
        for module in package.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Raise) and "ValueError(" in ast.unparse(node)
    }
    assert found == own


def fault(*args: Any, **kwargs: Any) -> None:
    """What a fault of the program may look like."""
    tuple(zip((1,), (1, 2), strict=True))


@pytest.mark.parametrize(
    ("owner", "name", "line"),
    [
        (corpus, "build", "data text --out out/data"),
        (search, "search", "PLAN"),
        (pretrain_gpt, "prepare", "pretrain --nproc-per-node 2"),
        (workflow.runs, "dataset", "run small.yaml --out out"),
    ],
)
def test_a_fault_of_the_program_keeps_its_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, line: str
) -> None:
    monkeypatch.setattr(owner, name, fault)
    words = [*PLAN] if line == "PLAN" else line.split()
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer") as error:
        call(monkeypatch, words)
    assert not isinstance(error.value, UserError)


def test_a_fault_in_front_of_a_rank_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_gpt, "prepare", fault)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
            pretrain_gpt.prepare_rank([])


def test_what_a_rank_finds_wrong_with_its_flags_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What only Megatron's own parser can tell, before any process group exists."""

    def refuse(argv: object) -> None:
        raise UserError("--flag: must be so; do so")

    monkeypatch.setattr(pretrain_gpt, "prepare_rank", lambda argv, **options: argv)
    monkeypatch.setattr(pretrain_gpt, "train", refuse)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        pretrain_gpt.main([])
    assert ended.value.code == 2
    assert capfd.readouterr().err == "error: --flag: must be so; do so\n"

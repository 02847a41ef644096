"""``benchmarks/gpu_matrix.py`` and ``benchmarks/fp16_band.py``: all but the runs themselves."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment.config import Fp16Config
from megatron_helix.experiment.metrics import RunMetrics
from tests.script_module import ROOT, script_module

PACKED = "configs/experiments/two_gpus_packed.yaml"
LONG = "configs/experiments/two_gpus_long.yaml"
QWEN = "configs/experiments/two_gpus_qwen.yaml"
HANGS = """
import sys, time
sys.path.insert(0, "benchmarks")
import gated
def hangs(flags):
    time.sleep(50)
gated.TURN_S, gated.pretrain_gpt.prepare_rank, gated.pretrain_gpt.train = 0.2, list, hangs
sys.argv = ["gated", "/"]  # a gate that is open
gated.main()
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scripts of ``benchmarks``, which import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: script_module(f"benchmarks/{name}.py")


def dry_run(matrix: ModuleType, *words: str) -> Result:
    app = typer.Typer()
    app.command()(matrix.main)
    return CliRunner().invoke(app, [*words, "--out", "runs/none", "--dry-run"])


def lines(matrix: ModuleType, *words: str) -> dict[str, list[str]]:
    """Flags by phase and layout."""
    ended = dry_run(matrix, *words)
    assert ended.exit_code == 0, ended.output
    found = (line.split(": ", 1) for line in ended.stdout.splitlines())
    return {" ".join(what.split()[::2]): flags.split() for what, flags in found}


def value(flags: list[str], flag: str) -> str:
    return flags[flags.index(flag) + 1]


@pytest.mark.parametrize(("length", "sequences", "layers"), [(8192, 16, 8), (131072, 2, 2)])
def test_long_at_other_lengths(benchmark: Any, length: int, sequences: int, layers: int) -> None:
    words = ["--experiment", LONG, "--parts", "train", "--micro-batches", "1"]
    words += ["--only", "cp2_p2p,cp2_a2a,megatron_fsdp,helix_2x1_mb1", "--layers", str(layers)]
    words += ["--sequences", str(sequences), "--sequence-length", str(length)]
    found = lines(benchmark("gpu_matrix"), *words)
    names = ["cp2_p2p", "cp2_a2a", "megatron_fsdp", "helix_2x1"]
    assert list(found) == [f"train {name}_mb1" for name in names]
    for flags in found.values():
        assert value(flags, "--seq-length") == value(flags, "--max-position-embeddings")
        assert value(flags, "--seq-length") == str(length)
        assert value(flags, "--global-batch-size") == str(sequences)
        assert value(flags, "--num-layers") == str(layers)
        assert value(flags, "--micro-batch-size") == "1"
        assert "--no-check-for-nan-in-loss-and-grad" in flags
    assert value(found["train helix_2x1_mb1"], "--helix-split") == "sequence"


@pytest.mark.parametrize(("file", "helix"), [(LONG, "helix_2x1_seq"), (PACKED, "helix_2x1")])
def test_a_sequence_split_gathers_each_weight_as_asked(
    benchmark: Any, file: str, helix: str
) -> None:
    names = [f"{helix}_{gather}" for gather in ("once", "step")]
    words = ["--experiment", file, "--parts", "train", "--only", ",".join(names)]
    found = lines(benchmark("gpu_matrix"), *words)
    assert list(found) == [f"train {name}" for name in names]
    for gather, flags in zip(("once", "step"), found.values(), strict=True):
        assert value(flags, "--helix-gather") == gather
        assert value(flags, "--helix-split") == "sequence"
        assert ("--dataloader-inter-document-masking" in flags) == (file == PACKED)
        assert value(flags, "--micro-batch-size") == "1"


def test_packed_rows_are_rehearsed_without_documents(benchmark: Any) -> None:
    words = ["--experiment", PACKED, "--device", "cpu", "--only", "dp2"]
    found = lines(benchmark("gpu_matrix"), *words)
    assert list(found) == ["prefill dp2", "train dp2"]
    assert not any("--dataloader-inter-document-masking" in flags for flags in found.values())


def test_a_file_is_run_as_it_is(benchmark: Any) -> None:
    words = ["--experiment", QWEN, "--only", "dp2,megatron_fsdp,helix_2x1_weights"]
    found = lines(benchmark("gpu_matrix"), *words)
    layouts = words[-1].split(",")
    assert list(found) == [f"{phase} {name}" for phase in ("prefill", "train") for name in layouts]
    for flags in found.values():
        assert value(flags, "--padded-vocab-size") == "152064"
        assert "--bf16" in flags


def test_a_rank_that_hangs_says_where_and_ends() -> None:
    """Within its turn, so that the turns behind it still come."""
    ended = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "in hangs" in ended.stderr


def test_every_layout_with_every_core_attention(benchmark: Any) -> None:
    words = ["--gpus", "2", "--models", "dense", "--parts", "train", "--cores", "spec,auto"]
    words += ["--micro-batches", "1,4", "--only", "tp2_mb1,helix_2x1_weights_mb4"]
    words += ["--sequences", "4", "--sequence-length", "8192"]
    found = lines(benchmark("gpu_matrix"), *words)
    arms = [f"{name}_{core}" for name in words[-5].split(",") for core in ("spec", "auto")]
    assert list(found) == [f"train {arm}" for arm in arms]
    taken = [value(flags, "--helix-core-attention") for flags in found.values()]
    assert taken == ["spec", "auto"] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--gpus: must be given without --experiment"),
        (["--gpus", "2", "--cores", "fast"], "--cores: must be some of .*, got 'fast'"),
        (["--gpus", "2", "--shape", "x"], "--shape: must be one of .*, got 'x'"),
        (["--experiment", QWEN, "--parts", "decode"], "--parts: must be some of prefill,train"),
        (["--experiment", QWEN, "--only", "cp2"], "--only: must be of dp2, .*tp2, got cp2"),
        (
            ["--experiment", QWEN, "--only", "megatron_fsdp"],
            "layouts: the first one makes .* begin",
        ),
    ],
)
def test_a_mistake_is_one_line(benchmark: Any, words: list[str], said: str) -> None:
    ended = dry_run(benchmark("gpu_matrix"), *words)
    assert isinstance(ended.exception, UserError)
    with pytest.raises(UserError, match=said):
        raise ended.exception


def test_a_file_is_rehearsed_on_a_cpu(benchmark: Any) -> None:
    words = ["--experiment", QWEN, "--device", "cpu", "--parts", "prefill"]
    found = lines(benchmark("gpu_matrix"), *words)
    names = {"tp2", "dp2", "megatron_fsdp", "torch_fsdp2"}
    names |= {"helix_2x1_weights", "helix_2x1_once", "helix_2x1_step"}
    assert {name.removeprefix("prefill ") for name in found} == names
    flags = found["prefill helix_2x1_weights"]
    assert (value(flags, "--hidden-size"), value(flags, "--num-query-groups")) == ("64", "2")
    assert "--add-qkv-bias" in flags
    assert "--padded-vocab-size" not in flags


def test_utilisation_is_of_the_formula(benchmark: Any) -> None:
    """One layer's FLOPs by hand, of a step that takes a second on two GPUs of 1 TFLOP/s."""
    timing, asked = benchmark("matrix_timing"), benchmark("matrix_asked")
    from megatron_helix.experiment import execution, runs
    from megatron_helix.experiment.config import ExperimentConfig
    from megatron_helix.run_config.layout import LayoutConfig

    model = asked.SHAPES["tiny"][0].model_copy(update={"num_layers": 1})
    layout = LayoutConfig(name="tp2", tp=2, micro_batch=4)
    experiment = ExperimentConfig(
        name="one",
        models=[model],
        layouts=[layout],
        world_size=2,
        batch={"sequences": 4, "sequence_length": 128},
        steps=2,
        device="cpu",
        peak_tflops=1,
    )
    run = runs.Run(model=model, layout=layout, phase="train", precision="fp32")
    layer = 2 * 256 * (2 * 8 + 2 * 8) * 32 + 4 * 128 * 8 * 32 + 2 * 2 * 256 * 1024
    flops = 3 * 4 * 128 * (layer + 2 * 256 * 256)
    assert execution.utilisation(experiment, run, 1e3)["mfu"] == pytest.approx(flops / 2 / 1e12)
    assert "FLOPs of a step / (step time x GPUs x peak of one)" in timing.MFU


def curve(*off: float, skipped: int = 0) -> Any:
    """A run whose losses and norms are 4 but for these parts of them."""
    run = RunMetrics.__new__(RunMetrics)
    said = [4 * (1 + part) for part in off]
    for key, of in (("losses", said), ("grad_norms", said), ("skipped_steps", skipped)):
        object.__setattr__(run, key, of)
    return run


@pytest.mark.parametrize(
    ("off", "skipped", "within"),
    [
        ((0, 3.9e-4), 0, True),  # the unfused runs are 2e-4 apart
        ((0, 4.1e-4), 0, False),
        ((4.1e-4, 0), 0, False),
        ((0, float("nan")), 0, False),
        ((0, 0), 1, False),
    ],
)
def test_the_band_is_twice_what_rounding_sets_apart(
    benchmark: Any, off: tuple[float, ...], skipped: int, within: bool
) -> None:
    band = benchmark("fp16_band")
    found = {
        band.FIRST: curve(0, 0),
        "unfused_mb2": curve(0, -1e-4),
        band.MEGATRON: curve(0, 1e-4),
        "prefix_mb4": curve(*off, skipped=skipped),
    }
    said = band.judged(found, "prefix_mb4")
    assert said["within"] == within
    assert said["loss"]["band"] == pytest.approx(4e-4, rel=1e-3)


def test_the_band_is_never_wider_than_that_of_experiments(benchmark: Any) -> None:
    band = benchmark("fp16_band")
    found = {band.FIRST: curve(0), "unfused_mb2": curve(0), band.MEGATRON: curve(1e-2)}
    said = band.judged({**found, "prefix_mb4": curve(3e-3)}, "prefix_mb4")
    assert said["loss"]["band"] == Fp16Config().band
    assert not said["within"]
    assert said["grad_norm"]["band"] == pytest.approx(2e-2, rel=2e-2)


@pytest.mark.parametrize("missing", ["unfused_mb4", "prefix_mb4", "megatron_mb4"])
def test_without_its_runs_there_is_no_band(benchmark: Any, missing: str) -> None:
    band = benchmark("fp16_band")
    names = ("unfused_mb4", "unfused_mb2", "megatron_mb4", "prefix_mb4")
    found = {name: curve(0) for name in names if name != missing}
    assert band.judged(found, "prefix_mb4") == {"within": False}

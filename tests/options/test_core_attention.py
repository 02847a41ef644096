"""``--helix-core-attention``: refusals before any process group, and what ``auto`` takes."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_helix import plugin
from megatron_helix.basics import files
from megatron_helix.kernels import core_times
from megatron_helix.kernels.core_times import MEASURED, CoreTime, fastest
from megatron_helix.kernels.prefix_attention import PrefixAttention
from megatron_helix.layers.layer_spec import CORE_ATTENTIONS
from megatron_helix.machine.hopper import HOPPER
from megatron_helix.options import arguments
from megatron_helix.options.core_attention import chosen, require_core_attention
from megatron_helix.options.features.models import MODELS
from megatron_helix.run_config.core_attention import NAMES, OWN
from tests.distributed import pretrain_launched, tiny_gpt

WIDE = (
    *("--num-attention-heads", "4", "--hidden-size", "64", "--kv-channels", "512"),
    *("--seq-length", "8192", "--attention-dropout", "0", "--bf16"),
)
Machine = Callable[..., None]
CUT = ("--helix-m", "2", "--helix-n", "2")
GPT = SimpleNamespace(
    transformer=SimpleNamespace(cuda_graph_impl="none"), transformer_layer_spec=None
)
HERE = HOPPER.model_dump(exclude_defaults=True)


def read(*flags: str) -> Any:
    return arguments._read([*WIDE, *flags])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One with a GPU of this capability, and ffpa-attn installed or not."""

    def pretend(capability: tuple[int, int] = (9, 0), *, ffpa: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        found = ModuleSpec("ffpa_attn", None) if ffpa else None
        monkeypatch.setattr("importlib.util.find_spec", lambda name: found)

    return pretend


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "dropout": (("--attention-dropout", "0.1"), r"ffpa needs --attention-dropout 0, .* got 0\.1;"),
    "windows": (("--window-size", "(8,0)"), r"ffpa has no kernel for windows, .* --window-size "),
    "offsets": (("--softmax-type", "learnable"), r"ffpa has no kernel .* --softmax-type learnable"),
    "documents": (
        ("--reset-attention-mask",),
        r"ffpa has no kernel .* --reset-attention-mask True;",
    ),
    "small heads": (("--kv-channels", "256"), r"ffpa has kernels for 320 to 512 .* got 256; use"),
    "partial scores": (("--helix-exchange", "scores"), r"ffpa never has the scores that"),
    "context parallelism": (("--context-parallel-size", "2"), r"ffpa attends within one rank"),
}


@pytest.mark.parametrize(("flags", "match"), REFUSED.values(), ids=REFUSED)
def test_what_ffpa_lacks_is_refused(machine: Machine, flags: tuple[str, ...], match: str) -> None:
    machine()
    require_core_attention(read("--helix-core-attention", "ffpa"), on_cpu=False)
    args = read("--helix-core-attention", "ffpa", *flags)
    with pytest.raises(ValueError, match=f"^--helix-core-attention: {match}"):
        require_core_attention(args, on_cpu=False)


def test_where_ffpa_cannot_be_is_refused(machine: Machine) -> None:
    args = read("--helix-core-attention", "ffpa")
    machine(ffpa=False)
    with pytest.raises(ValueError, match=r"not installed; pip install 'megatron-helix\[ffpa\]'$"):
        require_core_attention(args, on_cpu=False)
    machine((8, 0))
    with pytest.raises(ValueError, match=r"for Hopper .*, and this GPU has 8\.0; use"):
        require_core_attention(args, on_cpu=False)
    with pytest.raises(ValueError, match=r"ffpa needs a GPU, since .* got --helix-device cpu;"):
        require_core_attention(args, on_cpu=True)
    args.bf16 = False
    with pytest.raises(ValueError, match=r"got neither --bf16 nor --fp16; add one$"):
        require_core_attention(args, on_cpu=False)
    assert "ffpa_attn" not in sys.modules


def test_prefix_is_refused_with_partial_scores_only() -> None:
    prefix = ("--helix-core-attention", "prefix")
    for flags in (("--attention-dropout", "0.1"), ("--window-size", "(8,0)"), ()):
        require_core_attention(read(*prefix, *flags), on_cpu=True)
    with pytest.raises(ValueError, match=r"^--helix-core-attention: prefix never has the scores"):
        require_core_attention(read(*prefix, "--helix-exchange", "scores"), on_cpu=True)


def time(core: str, length: int, ms: float, channels: int = 512) -> CoreTime:
    return CoreTime(
        core=core,
        channels=channels,
        length=length,
        rows=16,
        forward_ms=1 / ms,  # the other way round
        training_ms=ms,
        memory_gb=1,
        source="a test",
    )


TIMES = [
    *(time("spec", 2048, 4), time("prefix", 2048, 3), time("ffpa", 2048, 5)),
    *(time("spec", 8192, 9), time("prefix", 8192, 8), time("ffpa", 8192, 7)),
    *(time("spec", 2048, 2, 128), time("prefix", 2048, 3, 128)),
    time("prefix", 65536, 1),  # spec's own was not measured there
]


@pytest.mark.parametrize(
    ("channels", "length", "cores", "expected"),
    [
        (512, 2048, ("prefix", "ffpa"), "prefix"),
        (512, 8192, ("prefix", "ffpa"), "ffpa"),
        (512, 4000, ("prefix", "ffpa"), "prefix"),
        (512, 4200, ("prefix", "ffpa"), "ffpa"),
        (512, 99999, ("prefix",), "prefix"),
        (512, 8192, (), "spec"),
        (448, 8192, ("ffpa",), "ffpa"),
        (128, 8192, ("prefix", "ffpa"), "spec"),
        (256, 8192, ("prefix", "ffpa"), "spec"),  # 512 is too far away to tell
        (1024, 8192, ("prefix", "ffpa"), "spec"),
    ],
)
def test_the_fastest_at_the_nearest_shape_is_taken(
    channels: int, length: int, cores: tuple[str, ...], expected: str
) -> None:
    size = {"channels": channels, "length": length}
    assert fastest(TIMES, cores, **size, training=True)[0] == expected
    if (channels, length) == (512, 2048):
        assert fastest(TIMES, cores, **size, training=False)[0] == "ffpa"


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("training", [False, True])
def test_heads_of_512_train_and_prefill_by_prefix(length: int, training: bool) -> None:
    size = {"length": length, "training": training}
    assert fastest(MEASURED, ["prefix", "ffpa"], channels=512, **size)[0] == "prefix"
    for fused in (128, 256):
        assert fastest(MEASURED, ["prefix"], channels=fused, **size)[0] == "spec"


def test_measured_times_are_the_stored_ones() -> None:
    stored = json.loads(Path("benchmarks/results/one_h200_core.json").read_text())
    rows = {
        (row["arm"], row["channels"], row["length"], row["sequences"] * row["heads"]): row
        for row in stored["rows"]
        if row["groups"] == row["heads"]
    }
    own = [one for one in MEASURED if one.core != "ffpa"]  # in a call of its own
    assert len(own) >= 10
    for one in own:
        row = rows[one.core, one.channels, one.length, one.rows]
        for name in ("forward_ms", "training_ms", "memory_gb"):
            assert getattr(one, name) == pytest.approx(row[name], rel=0.01)


def test_a_core_attention_is_in_every_place() -> None:
    """Of its recipe in docs/contributing.md, where a test can tell."""
    assert list(OWN) == [name for name in NAMES if name not in ("spec", "auto")]
    assert CORE_ATTENTIONS.keys() == OWN.keys()
    page = Path("docs/on_gpus.md").read_text()
    assert [name for name in OWN if f"\n| `{name}` | " not in page] == []
    noted = " ".join(row.note for row in MODELS)
    assert [name for name in OWN if f"--helix-core-attention {name}." not in noted] == []
    for core in CORE_ATTENTIONS.values():  # whether the kernel hides the future, or we do
        assert not (getattr(core, "takes_runs", False) and getattr(core, "aligns_at_end", False))


@pytest.mark.parametrize("core", OWN)
@pytest.mark.parametrize("packs", ["--sft", "--dataloader-inter-document-masking"])
def test_packed_documents_are_refused(machine: Machine, core: str, packs: str) -> None:
    machine()
    args = read("--helix-core-attention", core, packs)
    with pytest.raises(ValueError, match=f"^--helix-core-attention: {core} .* that {packs} packs"):
        require_core_attention(args, on_cpu=False)


def test_auto_says_what_it_takes_and_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    args = read("--helix-core-attention", "auto")
    taken = {}
    for training in (False, True):
        core, said = chosen(args, GPT, on_cpu=False, training=training)
        size = {"channels": 512, "length": 8192, "training": training}
        assert core == fastest(MEASURED, ["prefix", "ffpa"], **size)[0]
        assert said.startswith(f"helix core attention {core}, of spec, prefix, flex, ffpa: ")
        taken[training] = core
    assert taken == {False: "prefix", True: "prefix"}
    args.sft = True
    assert chosen(args, GPT, on_cpu=False, training=True)[0] == "spec"
    assert chosen(args, GPT, on_cpu=True, training=True)[0] == "spec"
    assert chosen(read(), GPT, on_cpu=False, training=True) == ("spec", "")
    args.sft = False
    monkeypatch.setattr(core_times, "MEASURED", TIMES)
    assert chosen(args, GPT, on_cpu=False, training=True)[0] == "ffpa"
    machine(ffpa=False)
    assert chosen(args, GPT, on_cpu=False, training=True)[0] == "prefix"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (CUT, "prefix"),
        (("--helix-m", "1", "--helix-n", "2"), "prefix"),
        ((*CUT, "--window-size", "(8,0)"), "prefix"),
        ((*CUT, "--attention-dropout", "0.1", "--helix-core-attention", "auto"), "prefix"),
        (("--helix-core-attention", "auto"), "prefix"),
        ((), "spec"),
        (("--helix-m", "1", "--helix-n", "1"), "spec"),
        ((*CUT, "--helix-core-attention", "spec"), "spec"),
        *(((*CUT, "--kv-channels", channels), "spec") for channels in ("128", "256")),
        ((*CUT, "--context-parallel-size", "2"), "spec"),
        ((*CUT, "--multi-latent-attention"), "spec"),
        ((*CUT, "--helix-exchange", "scores"), "spec"),
        ((*CUT, "--sft"), "spec"),
        ((*CUT, "--dataloader-inter-document-masking"), "spec"),
    ],
)
def test_a_partition_takes_auto_unless_told(
    machine: Machine, flags: tuple[str, ...], expected: str
) -> None:
    machine()
    args = read(*flags)
    require_core_attention(args, on_cpu=False)
    core, said = chosen(args, GPT, on_cpu=False, training=True)
    assert core == expected
    assert said.startswith(f"helix core attention {core}, of spec, ") == (core != "spec")
    assert arguments.choice(args).core_attention == (args.helix_core_attention or "spec")


@pytest.mark.parametrize("flags", [CUT, ()])
def test_ranks_of_a_cpu_and_generation_keep_the_specs(
    machine: Machine, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Without a line, whatever was measured."""
    machine()
    path = tmp_path / "here.yaml"
    files.write(path, yaml.safe_dump({**HERE, "core_attention": [t.model_dump() for t in TIMES]}))
    args = read(*flags, "--helix-hardware", str(path))
    for where in ({"on_cpu": True, "training": True}, {"on_cpu": False, "training": False}):
        assert chosen(args, GPT, **where) == ("spec", "")


def _with(**changed: Any) -> Any:
    """A GPT model config with other values; of its layers but for the spec."""
    spec = changed.pop("transformer_layer_spec", None)
    layers = SimpleNamespace(**{**vars(GPT.transformer), **changed})
    return SimpleNamespace(transformer=layers, transformer_layer_spec=spec)


KEPT: dict[str, tuple[tuple[str, ...], Any, tuple[int, int], str]] = {
    "dropout": (
        (*CUT, "--attention-dropout", "0.1"),
        GPT,
        (9, 0),
        "no other was timed with --attention-dropout, and they draw other masks",
    ),
    "graphs": (
        CUT,
        _with(cuda_graph_impl="local"),
        (9, 0),
        "no other has been captured by --cuda-graph-impl local",
    ),
    "a user's spec": (
        CUT,
        _with(transformer_layer_spec=lambda config: None),
        (9, 0),
        "a layer spec of your own is left its core attention",
    ),
    "another GPU": (
        CUT,
        GPT,
        (10, 0),
        "the times are of a Hopper GPU, and this is none; helix calibrate measures them",
    ),
    "what m > 1 refuses": (
        ("--helix-m", "1", "--helix-n", "4"),
        _with(fp8_dot_product_attention=True),
        (9, 0),
        "no other has been run beside fp8_dot_product_attention",
    ),
}


@pytest.mark.parametrize(("flags", "config", "capability", "reason"), KEPT.values(), ids=KEPT)
def test_what_was_not_run_keeps_the_specs_and_says_so(
    machine: Machine,
    flags: tuple[str, ...],
    config: Any,
    capability: tuple[int, int],
    reason: str,
) -> None:
    machine(capability)
    said = f"helix core attention spec: {reason}; --helix-core-attention auto takes prefix"
    assert chosen(read(*flags), config, on_cpu=False, training=True) == ("spec", said)
    small = read(*flags, "--kv-channels", "128")  # where there is nothing to keep it from
    assert chosen(small, config, on_cpu=False, training=True) == ("spec", "")
    asked = read(*flags, "--helix-core-attention", "auto")
    assert chosen(asked, config, on_cpu=False, training=True)[0] == "prefix"


def test_times_of_a_file_are_of_its_gpu(machine: Machine, tmp_path: Path) -> None:
    machine((10, 0))
    path = tmp_path / "here.yaml"
    files.write(path, yaml.safe_dump({**HERE, "core_attention": [t.model_dump() for t in TIMES]}))
    args = read(*CUT, "--helix-hardware", str(path))
    assert chosen(args, GPT, on_cpu=False, training=True)[0] == "prefix"
    files.write(path, yaml.safe_dump(HERE))  # whose core attentions nobody measured
    assert chosen(args, GPT, on_cpu=False, training=True)[0] == "spec"


def test_auto_goes_by_the_times_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    args = read("--helix-core-attention", "auto", "--helix-hardware", str(path))
    files.write(
        path, yaml.safe_dump({**HERE, "core_attention": [each.model_dump() for each in TIMES]})
    )
    assert chosen(args, GPT, on_cpu=True, training=True)[0] == "prefix"
    files.write(path, yaml.safe_dump(HERE))  # of a machine whose core attentions nobody measured
    assert chosen(args, GPT, on_cpu=True, training=True)[0] == "spec"
    files.write(path, "name: here\n")
    with pytest.raises(ValueError, match=r"here.yaml: devices: Field required"):
        chosen(args, GPT, on_cpu=True, training=True)


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the layers and masks that ``prefix`` was called with; ranks are forks."""
    file, forward = tmp_path / "used", PrefixAttention.forward
    file.touch()

    def noted(self: PrefixAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
        with file.open("a") as lines:
            lines.write(f"{self.layer_number} {args[3]}\n")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PrefixAttention, "forward", noted)
    return file


def test_the_flag_puts_prefix_into_every_layer(
    corpus_prefix: Path, tmp_path: Path, used: Path
) -> None:
    """Of a stock layout, too; and no mask is made that it would not need."""
    flags = tiny_gpt(corpus_prefix, "--tensor-model-parallel-size", "2", train_iters=1)
    pretrain_launched([*flags, "--helix-core-attention", "prefix"], 2, tmp_path)
    assert set(used.read_text().splitlines()) == {"1 None", "2 None"}


def test_a_partition_trains_by_what_is_fastest(
    corpus_prefix: Path, tmp_path: Path, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the spec's on a CPU, where nothing is said; as on a GPU by another, which is said once."""
    flags = tiny_gpt(corpus_prefix, "--helix-m", "2", "--helix-n", "1", train_iters=2)
    found = {"cpu": pretrain_launched(flags, 2, tmp_path / "cpu")}
    assert used.read_text() == ""

    def on_gpu(*args: Any, training: bool, **_: Any) -> tuple[str, str]:
        return chosen(*args, on_cpu=False, training=training)

    fast = [time("spec", 32, 2, channels=16), time("prefix", 32, 1, channels=16)]
    monkeypatch.setattr(core_times, "MEASURED", fast)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(plugin.core_attention, "chosen", on_gpu)
    found["gpu"] = pretrain_launched(flags, 2, tmp_path / "gpu")
    assert set(used.read_text().splitlines()) == {"1 None", "2 None"}
    for where, lines in (("cpu", 0), ("gpu", 1)):
        logs = [file.read_text() for file in (tmp_path / where / "logs").iterdir()]
        assert "".join(logs).count("helix core attention ") == lines
    assert found["gpu"].losses == pytest.approx(found["cpu"].losses, rel=1e-6)

"""The public models of configs/models: their sizes, and each of them trained as stock trains it.

For the trainings depth, width and context are scaled down; heads, query groups and all kinds stay.
At degrees that stock refuses: tests/test_models_any_degree.py.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from megatron_helix.basics.errors import UserError
from megatron_helix.machine import hardware
from megatron_helix.options import arguments, parsed
from megatron_helix.planner import parameters, search
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from tests.covering import THOROUGH
from tests.distributed import Curve, pretrain, tiny_gpt
from tests.models_case import MODELS, ROOT, page_script, scaled

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py
STEPS = 3
RANKS = 4  # of helix

PAGE = (ROOT / "docs" / "models.md").read_text()
SAID = "call python docs/models.py"


class Public(NamedTuple):
    """What is known of a model.

    Attributes:
        parameters: of the published checkpoint; two figures where no exact count was found.
        stock: ranks on which stock trains it here; one takes any head counts.
        m: segments of the head dimension on :data:`RANKS` ranks.
    """

    parameters: int | str
    stock: int
    m: int


PUBLIC = {
    "falcon_7b": Public("6.9B", stock=1, m=4),
    "gemma3_1b": Public(999_885_952, stock=4, m=4),
    "gemma3_27b": Public(27_009_346_304, stock=4, m=2),
    "glm4_9b": Public(9_399_951_360, stock=4, m=2),
    "gpt2_xl": Public(1_557_611_200, stock=1, m=4),
    "gpt_oss_20b": Public(20_914_757_184, stock=4, m=2),
    "llama3.1_8b": Public(8_030_261_248, stock=4, m=2),
    "llama3.2_3b": Public(3_212_749_824, stock=4, m=4),
    "phi4_14b": Public(14_659_507_200, stock=2, m=2),
    "qwen2.5_14b": Public(14_770_033_664, stock=4, m=2),
    "qwen2.5_7b": Public(7_615_616_512, stock=4, m=2),
    "qwen3_0.6b": Public(596_049_920, stock=4, m=4),
    "qwen3_30b_a3b": Public(30_532_122_624, stock=4, m=2),
    "smollm2_135m": Public(134_515_008, stock=1, m=4),
    "starcoder2_3b": Public("3.0B", stock=2, m=4),
}

# What no flag of Megatron's makes, norms behind attention and MLP; and rows that pad a vocabulary.
NOT_HELD = {
    "gemma3_1b": 2 * 26 * 1152,
    "gemma3_27b": 2 * 62 * 5376,
    "gpt2_xl": -15 * 1600,
}

Train = Callable[..., Curve]
Stock = Callable[[str], tuple[Curve, tuple[str, ...]]]

SOON = (("gpt2_xl", "activations"), ("glm4_9b", "weights"))


def test_the_files_are_those_that_the_tests_know() -> None:
    assert list(MODELS) == list(PUBLIC)
    assert all(model.name == stem for stem, model in MODELS.items())


@pytest.mark.parametrize("name", PUBLIC)
def test_the_planner_counts_the_published_parameters(name: str) -> None:
    """On one rank, all of them; to the published precision where that is all that is known."""
    one = LayoutConfig(name="one", tp=1, micro_batch=1)
    here = Deployment(MODELS[name], one, BatchConfig(sequences=1, sequence_length=16), 1).check()
    counted, published = sum(parameters.held(here, 0)), PUBLIC[name].parameters
    if isinstance(published, str):
        assert f"{counted / 1e9:.1f}B" == published
    else:
        assert counted + NOT_HELD.get(name, 0) == published


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The script that writes docs/models.md."""
    return page_script()


@pytest.fixture(scope="module")
def train(corpus_prefix: Path) -> Train:
    """Train a scaled model in a layout; experts are on ranks of their own.

    On at least two: on one, Megatron's expert with biases adds them in place to what autograd
    forbids it. And stock's gradients of such biases depend on the degree: it sums them over the
    tensor-parallel ranks, though each of these has other experts. Both train on :data:`RANKS` then.
    """

    def run(name: str, *flags: str, **layout: Any) -> Curve:
        model, size = scaled(name), layout.get("tp") or RANKS
        ranks = max(size, 2) if model.num_experts else size
        here = LayoutConfig(name="case", micro_batch=4, ep=ranks, **layout)
        words = (*model.flags(), *here.flags(model), *flags)
        return pretrain(tiny_gpt(corpus_prefix, *words, train_iters=STEPS), ranks)

    return run


@pytest.fixture(scope="module")
def stock(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """How stock trains a model, once for each, and the flags that let another do the same."""

    @cache
    def run(name: str) -> tuple[Curve, tuple[str, ...]]:
        flags: tuple[str, ...] = ()
        if MODELS[name].softmax_type == "learnable":
            flags = _same_offsets(name, train, str(tmp_path_factory.mktemp(name)))
        return train(name, *flags, tp=PUBLIC[name].stock), flags

    return run


def _same_offsets(name: str, train: Train, folder: str) -> tuple[str, ...]:
    """Flags of a training from a checkpoint of one tensor-parallel rank, without clipping.

    Of several ranks stock draws offsets alike on each, and counts the first one's in the norm.
    """
    steps = ("--train-iters", str(STEPS + 1))
    train(name, *steps, "--save", folder, "--save-interval", "1", "--exit-interval", "1", tp=1)
    return (*steps, "--load", folder, "--ckpt-step", "1", "--clip-grad", "0")


@pytest.mark.parametrize(
    ("name", "exchange"),
    [
        pytest.param(*case, marks=() if case in SOON else THOROUGH)
        for case in product(PUBLIC, ("activations", "weights"))
    ],
)
def test_a_model_trains_as_stock(name: str, exchange: str, train: Train, stock: Stock) -> None:
    (expected, flags), m = stock(name), PUBLIC[name].m
    helix = train(name, *flags, m=m, n=RANKS // m, exchange=exchange)
    assert len(expected.losses) == STEPS
    assert_alike(helix, expected)


@THOROUGH
def test_gradient_norms_of_experts_with_biases(train: Train) -> None:
    """Of gpt-oss without offsets, whose norms stock counts otherwise; see `_same_offsets`."""
    name, vanilla = "gpt_oss_20b", ("--softmax-type", "vanilla")
    expected = train(name, *vanilla, tp=RANKS)
    assert len(expected.grad_norms) == STEPS
    for exchange in ("activations", "weights"):
        assert_alike(train(name, *vanilla, m=2, n=2, exchange=exchange), expected)


def assert_alike(actual: Curve, expected: Curve) -> None:
    """Loss and gradient norm of every step agree."""
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


def test_the_page_is_current(page: ModuleType) -> None:
    assert page.page(PAGE, [part for part in page.PARTS if part != "plans"]) == PAGE, SAID


@THOROUGH
def test_the_plans_of_the_page_are_current(page: ModuleType) -> None:
    assert page.page(PAGE) == PAGE, SAID


def test_a_figure_changed_by_hand_is_found(page: ModuleType) -> None:
    assert "| phi4_14b | 40 / 10 | s | s | 3x1 | 2x2 |" in PAGE  # stock refuses four ranks
    forged = PAGE.replace("| 40 / 10 | s | s | 3x1 | 2x2 |", "| 40 / 10 | s | s | 3x1 | s |")
    assert page.page(forged, ["degrees"]) == PAGE


def test_of_more_ranks_than_query_groups_stock_holds_whole_ones(page: ModuleType) -> None:
    model = MODELS["glm4_9b"]  # two groups
    of_group = 2 * model.kv_channels * model.num_layers * 2
    for degree, groups in ((1, 2), (2, 1), (8, 1)):
        assert page.stock_takes(model, degree)
        assert page.cache_bytes_of_token(page.stock(model, degree)) == groups * of_group
        assert page.cache_bytes_of_token(page.helix(model, degree)) == 2 * of_group / degree
    assert not page.stock_takes(model, 3)
    assert page.helix(model, 3).cut.waste > 0


def test_a_model_is_not_planned_for_more_than_its_positions() -> None:
    machine = hardware.load(ROOT / "configs" / "hardware" / "h100_2.yaml")
    batch = BatchConfig(sequences=4, sequence_length=2048)
    said = r"^sequence_length: must be at most gpt2_xl's max_position_embeddings \(1024\), got 2048"
    with pytest.raises(ValueError, match=said):
        search.search(MODELS["gpt2_xl"], machine, batch)


def test_experts_with_biases_are_not_cut() -> None:
    layout = LayoutConfig(name="cut", tp=2, etp=2, micro_batch=1)
    batch = BatchConfig(sequences=4, sequence_length=64)
    with pytest.raises(ValueError, match=r"^etp: experts with biases need 1, got 2; use 1"):
        Deployment(MODELS["gpt_oss_20b"], layout, batch, 2).check()
    Deployment(MODELS["qwen3_30b_a3b"], layout, batch, 2).check()


def test_a_model_has_one_gate(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    text = (ROOT / "configs" / "models" / "llama3.1_8b.yaml").read_text()
    path.write_text(text + "quick_geglu: true\n")
    said = r"two\.yaml: quick_geglu: must be false beside swiglu, got true; leave one out"
    with pytest.raises(ValueError, match=said):
        read_config(ModelConfig, path)


def test_what_a_cpu_cannot_do_of_a_model_is_refused() -> None:
    """Gemma's norms; the flags of all others are fine, on as many ranks as they like."""
    refused = {}
    for name, model in MODELS.items():
        try:
            arguments.complete([*model.flags(), "--helix-device", "cpu"], 1)
        except UserError as error:
            refused[name] = str(error).partition(", which")[0]
    said = "--apply-layernorm-1p: needs TransformerEngine's norms"
    assert refused == {"gemma3_1b": said, "gemma3_27b": said}


@pytest.mark.parametrize("name", PUBLIC)
def test_megatron_knows_every_flag(name: str) -> None:
    parsed.require_known(MODELS[name].flags())
    parsed.require_flags([*MODELS[name].flags(), "--helix-m", "2", "--helix-n", "1"])

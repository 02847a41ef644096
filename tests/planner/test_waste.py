"""What zeros that pad add to a layout's weights: computed, printed, and bounded in the search."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_helix.cli import app
from megatron_helix.machine import hardware
from megatron_helix.planner import parameters, search
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.sizes import layout_of
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

MODELS = Path("configs/models")
FILES = ("--model", str(MODELS / "qwen2.5_7b.yaml"))
FILES = (*FILES, "--hardware", "configs/hardware/h100_2x8_ib.yaml", "--devices", "6")
STEP = ("--batch", "12", "--seq", "2052")
QWEN = read_config(ModelConfig, MODELS / "qwen2.5_7b.yaml")
EXPERTS = read_config(ModelConfig, MODELS / "qwen3_30b_a3b.yaml")
SIX = hardware.load(Path("configs/hardware/h100_2x8_ib.yaml")).scaled(6)
BATCH = BatchConfig(sequences=12, sequence_length=2052)


def test_cuts_that_waste_too_much_are_left_out() -> None:
    """Of eight rotary pairs, three segments of three are an eighth more; five of two a quarter."""
    model = QWEN.model_copy(
        update={"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16}
    )
    segments = {cut["m"] for cut in search._cuts(model, 240, "decode") if "m" in cut}
    assert segments == {2, 3, 4, 8}
    assert {m: layout_of(model, m, 1).waste for m in (3, 4, 5)} == {3: 1 / 8, 4: 0, 5: 1 / 4}


def test_features_that_waste_too_much_are_left_out() -> None:
    """Of an expert's four features three ranks would store half as many again."""
    few = EXPERTS.model_copy(update={"ffn_hidden_size": 4})
    for model, cut in ((EXPERTS, {1, 2, 3, 6}), (few, {1, 2})):
        found = list(search.deployments(model, SIX, BATCH, "train"))
        assert {here.layout.etp for here in found if here.layout.is_helix} == cut
        assert all(max(here.waste) <= search.MOST_WASTE for here in found)


@pytest.mark.parametrize(("m", "n"), [(3, 1), (3, 2), (5, 1), (2, 2)])
def test_waste_is_what_the_parameters_have_more(m: int, n: int) -> None:
    """Of a model of attention and MLPs, nearly: the rest is left out of both counts."""
    one = QWEN.model_copy(update={"vocab_size": 16, "num_layers": 1, "add_qkv_bias": False})
    batch = BatchConfig(sequences=m, sequence_length=16 * m * n)
    stock = LayoutConfig(name="one", tp=1, micro_batch=1)
    helix = LayoutConfig(name="cut", m=m, n=n, micro_batch=m)
    whole = Deployment(one, stock, batch, 1).check()
    cut = Deployment(one, helix, batch, m * n).check()
    assert whole.waste == (0, 0)
    channels = (28 + 28 + 4 + 4) * 128 * one.hidden_size
    features = 3 * one.ffn_hidden_size * one.hidden_size
    norms_and_rows = sum(parameters.held(whole, 0)) - channels - features
    more = channels * cut.waste.attention + features * cut.waste.mlp
    rows = (-16 % (16 * m * n)) * one.hidden_size if m * n > 1 else 0
    held = m * n * sum(parameters.held(cut, 0))
    assert held == pytest.approx(channels + features + more, abs=m * n * norms_and_rows + rows)


def test_a_plan_says_it_where_there_is_any() -> None:
    asked = ("--layout", "m=3,n=2,micro_batch=3", "--layout", "tp=2,micro_batch=1")
    said = CliRunner().invoke(app, ["plan", *FILES, *STEP, *asked, "--json"])
    wastes = [row["waste"] for row in json.loads(said.output)["layouts"]]
    assert wastes[0]["attention"] == pytest.approx(4 / 128)
    assert wastes[0]["mlp"] == pytest.approx(4 / 18944)
    assert wastes[1] == {"attention": 0, "mlp": 0}
    table = CliRunner().invoke(app, ["plan", *FILES, *STEP, *asked]).output
    assert "3.1 / 0.0" in table
    assert "zeros" in table
    terms = CliRunner().invoke(app, ["plan", *FILES, *STEP, "--explain", asked[1]]).output
    assert "3.1 / 0.0 %" in " ".join(terms.split())
    none = CliRunner().invoke(app, ["plan", *FILES, *STEP, *asked[2:]]).output
    assert "zeros" not in none

"""The report's pictures: what is told apart, and what is said of where it was measured."""

from pathlib import Path
from typing import Any

import pytest

from megatron_helix.report import load_map, plots
from tests.experiment_case import Values, experiment


def test_every_layout_is_seen_though_all_losses_are_alike(finished: tuple[Path, Values]) -> None:
    """Other curves than the broad first one differ in colour, and take turns along it."""
    one = finished[1]["result_collection"][0]
    names = ("first", "second", "third", "fourth")
    figure = plots._losses([{**one, "layout": name} for name in names], "loss")
    curves: list[Any] = [*figure.axes[0].lines]
    first, *others = curves
    assert len({line.get_color() for line in curves}) == len(names)
    assert first.get_linewidth() > max(line.get_linewidth() for line in others)
    offsets, patterns = zip(*(line._unscaled_dash_pattern for line in others), strict=True)
    (dash, gap) = patterns[0]
    assert {*patterns} == {(dash, gap)}
    assert dash + gap == dash * len(others)
    assert [offset / dash for offset in offsets] == [0, 1, 2]


def test_the_colours_of_loads_reach_all_that_is_in_the_cells(finished: tuple[Path, Values]) -> None:
    cut = finished[1]["partitioning_setup/tiny-helix_2x2"]
    loads = {"parameters": [1.0, 1.0, 1.0, 9.0], "FLOPs": [1.0, 1.0, 1.0, 1.0]}
    check = {"run": "tiny-helix_2x2", "loads": loads, "ratios": {"parameters": 3.0, "FLOPs": 1.0}}
    figure = load_map.draw([(check, cut)], 8.0)
    shown = figure.axes[0].images[0].norm
    assert (shown.vmin, shown.vmax) == (1 / 3, 3.0)
    even = load_map.draw([({**check, "loads": {**loads, "parameters": [1.0] * 4}}, cut)], 8.0)
    assert even.axes[0].images[0].norm.vmax == 1.5


@pytest.mark.parametrize(("device", "said"), [("cpu", "say nothing about GPUs"), ("cuda", "ranks")])
def test_what_clocks_were_read_on_is_in_their_pictures(
    finished: tuple[Path, Values], device: str, said: str
) -> None:
    asked = experiment().model_copy(update={"device": device})
    where = plots._where(asked)
    assert where.endswith(said)
    assert where.startswith(f"4 {device.upper()} ranks")
    found = finished[1]["result_collection"]
    figure = plots._bars(found, where)
    assert figure.get_suptitle() == where
    (legend,) = figure.legends
    layouts = ["tp2_pp2", "helix_2x2"]
    assert [text.get_text() for text in legend.get_texts()] == layouts

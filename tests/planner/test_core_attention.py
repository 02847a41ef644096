"""FLOPs and memory of core attentions as they are planned."""

from typing import Any

import pytest

from megatron_helix.planner import core_attention, flops, memory
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from tests.planner.planner_case import DENSE, SMALL


def test_unfused_attention_adds_up_and_is_slower_by_scores() -> None:
    """A head dimension that a fused kernel takes saves the passes over the scores."""
    layout = LayoutConfig(name="one", tp=8, pp=2, micro_batch=4)
    here = Deployment(DENSE, layout, SMALL, 16, precision="bf16").check()
    parts = {limit: flops.forward(here, 0, fused_channels=limit) for limit in (256, 512)}
    unfused, fused = (
        [part for part in found if "attention" in part.what] for found in parts.values()
    )
    scores = here.layers * here.tokens * SMALL.sequence_length * 16 / 8 * 2
    assert [part.memory_bytes for part in unfused if "scores" in part.what] == [4 * scores]
    assert sum(part.flops for part in unfused[1:]) == 2 * fused[1].flops
    for stage, in_flight in ((0, 2), (1, 1)):  # micro-batches that a stage of two keeps
        needs = [memory.of_rank(here, stage, fused_channels=c).activations for c in (256, 512)]
        assert needs[0] - needs[1] == in_flight * scores + 2 * scores / here.layers


def _with_core(core: str, *, length: int, channels: int = 512, **layout: Any) -> Deployment:
    """A layer of four heads in training or, with ``phase``, what it says."""
    model = DENSE.model_copy(update={"kv_channels": channels})
    phase = layout.pop("phase", "train")
    batch = BatchConfig(sequences=4, sequence_length=length)
    how = LayoutConfig(name=core, core_attention=core, micro_batch=4, **(layout or {"tp": 4}))
    return Deployment(model, how, batch, 4, phase=phase, precision="bf16").check()


@pytest.mark.parametrize(
    ("length", "share", "kept"),
    [(1024, 3 / 4, True), (2048, 5 / 8, True), (4096, 9 / 16, True), (8192, 9 / 16, False)],
)
def test_attention_in_pieces_does_and_keeps_what_its_pieces_say(
    length: int, share: float, kept: bool
) -> None:
    """Half to three quarters of the square; one piece's scores at a time, or all that it made."""
    spec = core_attention.of_layer(_with_core("spec", length=length), fused_channels=256)
    prefix = core_attention.of_layer(_with_core("prefix", length=length), fused_channels=256)
    again = 1 if kept else 7 / 6
    assert prefix.flops == pytest.approx(spec.flops * share * again)
    assert prefix.score_bytes == pytest.approx(spec.score_bytes * share * (1 if kept else 1.25))
    assert prefix.kept_bytes == pytest.approx(spec.kept_bytes * share if kept else 0)
    pieces = 1 / (2 * share - 1)
    largest = spec.kept_bytes / pieces
    assert prefix.passing_bytes == pytest.approx(largest * (1 if kept else 2))


def test_core_attentions_are_planned_as_what_they_are() -> None:
    """Fused ones without scores; ``auto`` the spec's where it is fused; a prefill keeps none."""

    def of(core: str, fused_channels: int = 256, **how: Any) -> core_attention.Core:
        return core_attention.of_layer(
            _with_core(core, length=2048, **how), fused_channels=fused_channels
        )

    flags = _with_core("prefix", length=2048).layout.flags(DENSE)
    assert flags[flags.index("--helix-core-attention") + 1] == "prefix"
    assert of("ffpa") == of("flex") == of("spec", 512)
    assert of("auto") == of("prefix")
    assert of("auto", 512) == of("spec", 512)
    assert of("prefix", phase="prefill").kept_bytes == 0
    sequence = {"m": 4, "n": 1, "exchange": "weights", "split": "sequence"}
    assert of("prefix", **sequence).flops == pytest.approx(of("spec", **sequence).flops)
    assert of("prefix", **sequence).kept_bytes < of("spec", **sequence).kept_bytes
    assert of("spec", 512, **sequence).flops == pytest.approx(of("spec", 512).flops * 9 / 8)
    # Two pieces of 9/16 of the keys and values, whose gradients are added up in fp32.
    keys = 2 * 4 * 2048 * 16 * 512
    for core, limit in (("spec", 256), ("spec", 512), ("ffpa", 256)):
        summed = keys * (4 + 2 * 9 / 16 * (2 + 8) + 4 + 2)
        assert of(core, limit, **sequence).summed_bytes == pytest.approx(summed)
    assert of("prefix", **sequence).summed_bytes == 0
    scores = {"m": 4, "n": 1, "exchange": "scores"}
    assert of("auto", **scores) == of("spec", **scores)

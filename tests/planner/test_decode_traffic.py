"""Predicted bytes of decode steps against closed forms, and what the ledger counts of experts."""

import dataclasses

import pytest

from megatron_helix.exchange import traffic
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.traffic import AXES, step_bytes
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from tests.distributed import run_distributed
from tests.inference import decode_case
from tests.planner.test_traffic import CUT, MODELS, take_routed


@pytest.mark.parametrize("model", ["dense", "gqa", "unlike"])
@pytest.mark.parametrize(
    ("layout", "split"),
    [
        ({"tp": 2, "micro_batch": 4}, "batch"),
        ({**CUT, "micro_batch": 4}, "batch"),
        ({**CUT, "micro_batch": 1}, "sequence"),
        ({"m": 4, "n": 1, "micro_batch": 2}, "sequence"),
        ({**CUT, "exchange": "scores"}, "none"),
    ],
)
def test_a_decode_step_is_the_closed_form_that_generation_is_held_to(
    model: str, layout: dict, split: str
) -> None:
    """tests/inference/test_decode.py holds the same closed form against live decode steps."""
    cut = LayoutConfig(name="case", **layout)
    ranks = cut.tensor_parallel_size
    batch = BatchConfig(sequences=cut.micro_batch, sequence_length=24)
    here = Deployment(MODELS[model], cut, batch, ranks, "decode", "fp32").check()
    form = traffic.decode_bytes(
        split,
        here.cut,
        here.block,
        batch=cut.micro_batch,
        vocabulary=here.vocabulary,
        element_bytes=4,
        positions=batch.sequence_length,
    )
    assert step_bytes(here, 0) == {(AXES[axis], kind): sent for (axis, kind), sent in form.items()}


@pytest.mark.parametrize(
    "layout", [decode_case.Layout(tp=4), decode_case.helix(2, 2)], ids=["stock", "helix"]
)
def test_in_decode_every_rank_sends_every_token_to_its_experts(layout: decode_case.Layout) -> None:
    """Without sequence parallelism Megatron routes a token on each rank of a group anew."""
    layout = dataclasses.replace(layout, ep=4, sequence_parallel=True)
    routed = decode_case.MODELS["moe"]
    model = ModelConfig(
        name="moe",
        num_layers=2,
        hidden_size=64,
        num_attention_heads=routed.heads,
        kv_channels=routed.channels,
        ffn_hidden_size=routed.more["moe_ffn_hidden_size"],
        num_experts=routed.more["num_moe_experts"],
        vocab_size=decode_case.VOCABULARY,
    )
    how = {"m": layout.m, "n": layout.n} if layout.m else {"tp": layout.tp}
    cut = LayoutConfig(name="case", ep=4, micro_batch=8, **how)
    batch = BatchConfig(sequences=8, sequence_length=16)
    ranks = run_distributed(decode_case.generate, 4, routed, layout, (8,))
    here = Deployment(model, cut, batch, 4, "decode", "fp32")
    predicted = [step_bytes(here, rank) for rank in range(4)]
    axes = {AXES[axis]: axis for axis in ("tp", "dim")}
    wanted = [{(axes.get(a, a), k): sent for (a, k), sent in one.items()} for one in predicted]
    for step in range(decode_case.NEW_TOKENS - 1):
        sent = [
            {key: count for key, count in found.step_bytes[step].items() if count}
            for (found,) in ranks
        ]
        kept = [dict(found.kept_bytes[step]) for (found,) in ranks]
        take_routed(sent, kept, [dict(one) for one in wanted], layout.ep)
        assert sent == [
            {key: count for key, count in one.items() if key != (AXES["ep"], "all_to_all")}
            for one in wanted
        ]

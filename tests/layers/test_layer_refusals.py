"""What a layer refuses where it is made or called: what no flag asks for."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module

from megatron_helix.exchange.strategy import Choice
from megatron_helix.fuzz.session import CallFailed
from megatron_helix.layers.layer_spec import helixify, with_sequence_parallel_norms
from megatron_helix.partition.layout import HelixLayout
from tests import block_case
from tests.distributed import model_parallel, run_distributed
from tests.packed_case import params


def test_cross_attention_is_refused() -> None:
    spec, layout = get_t5_decoder_with_local_block_spec(1), block_case.Block().layout(2, 2)
    message = r"^--helix-m: CrossAttention has no head-dimension partition, got 2; use --helix-m 1"
    with pytest.raises(ValueError, match=message):
        helixify(spec, layout)
    assert helixify(spec, block_case.Block().layout(1, 4)) is spec


WRONGLY_PACKED = {
    "documents": (
        {"packed_seq_params": params([4, 2])},
        r"packed_seq_params: documents must add up to the row's 8 tokens, got .* 6;",
    ),
    "rows": (
        {"hidden_states": torch.ones(8, 2, 32), "packed_seq_params": params([8, 8])},
        "packed_seq_params: a micro-batch of packed rows must be flattened into one, got 2 of 8",
    ),
    "inference": (
        {"inference_context": StaticInferenceContext(1, 8)},
        "packed_seq_params: are of training under --helix-m > 1, got them beside an inference_",
    ),
    "mask": ({}, r"attn_mask_type: packed documents .* causally, got no_mask from the layer spec;"),
}


def test_what_packed_rows_do_not_go_with_is_refused() -> None:
    def call() -> None:
        with model_parallel(tp=2):
            block = block_case.Block(layers=1)
            groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
            (layer,) = block_case.build(block, groups, block.layout(2, 1), sequence_parallel=False)
            row = {"hidden_states": torch.ones(8, 1, 32), "packed_seq_params": params([3, 5])}
            layer(attention_mask=None, **row)
            layer.self_attention.attn_mask_type = AttnMaskType.no_mask  # pyright: ignore
            for wrong, message in WRONGLY_PACKED.values():
                with pytest.raises(ValueError, match=f"^{message}"):
                    layer(attention_mask=None, **{**row, **wrong})

    run_distributed(call, 2)


class Gated(SelfAttention):
    """A class of a user's own."""


def test_a_self_attention_of_ones_own_is_refused() -> None:
    layer, layout = get_gpt_layer_local_spec(), block_case.Block().layout(2, 2)
    own = dataclasses.replace(layer.submodules.self_attention, module=Gated)
    submodules = dataclasses.replace(layer.submodules, self_attention=own)
    spec = dataclasses.replace(layer, submodules=submodules)
    message = (
        r"^--spec: under --helix-m 2 the self-attention of a layer must be megatron-core's"
        r" SelfAttention, .*, got tests\.layers\.test_layer_refusals\.Gated; use .* --helix-m 1"
    )
    with pytest.raises(ValueError, match=message):
        helixify(spec, layout)
    assert helixify(spec, block_case.Block().layout(1, 4)) is spec
    without = dataclasses.replace(layer.submodules, self_attention=IdentityOp)
    with pytest.raises(ValueError, match=r"got megatron\.core\..*\.IdentityOp; use"):
        helixify(dataclasses.replace(layer, submodules=without), layout)


@pytest.mark.parametrize("exchange", ["activations", "weights"])
def test_a_mask_of_padding_is_refused_in_the_order_of_the_block(exchange: str) -> None:
    """Elsewhere, and by layers without experts, it is seen as in stock."""

    def gradient(layout: HelixLayout | None, experts: int | None) -> torch.Tensor:
        with model_parallel(tp=4):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            layer, config = padded_layer(groups, layout, exchange, experts)
            draw = torch.Generator().manual_seed(1)
            stream = torch.randn(2, 4, config.hidden_size, generator=draw)
            mask = torch.rand(4, 2, generator=draw) < 0.3
            layer(stream, None, padding_mask=mask)[0].sum().backward()
            weight = layer.mlp.router.weight if experts else layer.mlp.linear_fc1.weight
            assert weight.grad is not None
            return weight.grad

    layout = block_case.Block().layout(2, 2)
    message = r"padding_mask: must speak of the tokens .*; use --helix-exchange activations"
    if exchange == "weights":
        with pytest.raises(CallFailed, match=message):
            run_distributed(gradient, 4, layout, 4)
        run_distributed(gradient, 4, layout, None)
    else:
        stock, helix = (run_distributed(gradient, 4, cut, 4) for cut in (None, layout))
        for expected, actual in zip(stock, helix, strict=True):
            torch.testing.assert_close(actual, expected)


def padded_layer(
    groups: ProcessGroupCollection, layout: HelixLayout | None, exchange: str, experts: int | None
) -> Any:
    """A layer on ``groups.tp`` and its config; its experts, if any, are balanced by a loss."""
    more = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.5}
    block = block_case.Block(layers=1, bias=False, more=more if experts else {})
    config, _ = block_case.describe(block, groups)
    spec: Any = get_gpt_layer_local_spec(num_experts=experts)
    if layout:
        spec = helixify(spec, layout, Choice(exchange=exchange, split="batch"))
    (spec,) = with_sequence_parallel_norms(spec, config).layer_specs
    torch.manual_seed(1)
    return build_module(spec, config=config, layer_number=1, pg_collection=groups), config

"""What is predicted of fully sharded data parallelism where no ledger has counted it."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_helix.planner import fsdp, memory, parameters, traffic, update
from megatron_helix.planner.deployment import Deployment
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.gradients import GradientFlags
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

QWEN = ModelConfig(
    name="qwen",
    num_layers=12,
    hidden_size=3584,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    ffn_hidden_size=18944,
    swiglu=True,
    vocab_size=152064,
    untie_embeddings_and_output_weights=True,
)
BATCH = BatchConfig(sequences=16, sequence_length=4096)
KINDS = ("megatron_fsdp", "torch_fsdp2")


def with_padding(here: Deployment) -> tuple[float, float]:
    """Elements of all layers and of what lies outside them, as they are sent."""
    ranks, (before, after) = here.replicas, parameters.end_shapes(here, True, True)
    layer = fsdp.shard_size(here, parameters.layer_shapes(here), ranks) * ranks
    ends = sum(fsdp.shard_size(here, shapes, ranks) * ranks for shapes in (before, after))
    return layer * here.layers, ends


def sharded(fsdp: str | None, ranks: int = 2, micro_batch: int = 2, **more: int) -> Deployment:
    """The model on so many ranks, in bf16."""
    keys = {"fsdp": fsdp} if fsdp else {"distributed_optimizer": True}
    layout = LayoutConfig(name="case", tp=1, micro_batch=micro_batch, **keys, **more)
    return Deployment(QWEN, layout, BATCH, ranks, precision="bf16").check()


def test_megatron_fsdp_gathers_as_often_as_it_was_seen_to() -> None:
    """98 all-gathers a step, counted among the kernels of two GPUs (docs/performance.md)."""
    calls = Counter()
    for moved in traffic.transfers(sharded("megatron_fsdp"), 0):
        calls[moved.kind] += moved.calls
    assert calls["all_gather"] == 98


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_micro_batch_moves_is_the_model_three_times(kind: str) -> None:
    """Of Megatron FSDP what lies outside the layers once a step, and its gradients every time."""
    here = sharded(kind)
    layers, ends = (size * here.element_bytes for size in with_padding(here))
    whole, stays = layers + ends, ends if kind == "megatron_fsdp" else 0
    sent = Counter()
    for moved in traffic.transfers(here, 0):
        if moved.what in ("weights", "gradients"):
            sent[moved.kind] += moved.sent_bytes  # type: ignore[assignment]
    times = here.microbatches
    assert sent["all_gather"] == (2 * times * (whole - stays) + stays) / 2
    assert sent["reduce_scatter"] == times * whole / 2


@pytest.mark.parametrize("fsdp", KINDS)
def test_more_ranks_keep_less_each(fsdp: str) -> None:
    two, eight, replicated = (
        memory.of_rank(sharded(kind, ranks, micro_batch=1), 0, fused_channels=256)
        for kind, ranks in ((fsdp, 2), (fsdp, 8), (None, 2))
    )
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(two, part) / 4
    assert two.weights == replicated.weights / 2
    assert two.gradients == replicated.gradients / 4  # bf16, where stock adds up in fp32
    assert two.total < replicated.total


@pytest.mark.parametrize(
    ("told", "summed", "sent"),
    [
        ({}, 2, 2),
        ({"megatron_fsdp_main_grads_dtype": "fp32"}, 4, 4),
        (
            {"megatron_fsdp_main_grads_dtype": "fp32", "megatron_fsdp_grad_comm_dtype": "bf16"},
            *(4, 2),
        ),
        ({"grad_reduce_in_bf16": True, "accumulate_allreduce_grads_in_fp32": True}, 2, 2),
    ],
    ids=str,
)
def test_megatron_fsdp_adds_up_and_sends_in_what_it_is_told(
    told: dict, summed: int, sent: int
) -> None:
    here = replace(sharded("megatron_fsdp"), gradient_flags=GradientFlags(**told))
    whole, shard = sum(parameters.held(here, 0)), parameters.kept(here, 0)
    need = memory.of_rank(here, 0, fused_channels=256)
    assert need.gradients == summed * shard
    layer = sum(rows * columns for rows, columns in parameters.layer_shapes(here))
    ends = sum(r * c for part in parameters.end_shapes(here, True, True) for r, c in part)
    # At the highest point, in the passes: two layers, what stays, and a layer's gradients.
    assert need.gathered_weights == 2 * (2 * layer + ends) + sent * layer
    scattered = (t for t in traffic.transfers(here, 0) if t.kind == "reduce_scatter")
    padded = sum(with_padding(here))
    assert whole < padded < 1.001 * whole
    assert sum(t.sent_bytes for t in scattered) == here.microbatches * sent * padded / 2
    copied = (2 + sent) * whole + (sent + 2 * summed) * shard
    assert update.accumulation_bytes(here, 0) == copied


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [("p2p", 2 * 4, 4 * 4), ("all_gather", 2 * 4, 4 * 4), ("a2a", (2 * 28 + 2 * 4) / 2, 32)],
)
def test_context_parallelism_moves_keys_and_values_or_heads(
    kind: str, forward: float, backward: float
) -> None:
    """Elements of a token's head channels that a rank sends for each of its tokens and layers."""
    layout = LayoutConfig(name="case", tp=1, cp=2, cp_comm_type=kind, micro_batch=1)
    here = Deployment(QWEN, layout, BATCH, 2, precision="bf16").check()
    sent = Counter()
    for moved in traffic.transfers(here, 0):
        if moved.axis == "cp":
            sent[moved.when] += moved.sent_bytes  # type: ignore[assignment]
    unit = here.tokens * QWEN.kv_channels * here.element_bytes * here.layers * here.microbatches
    assert sent == {"forward": forward * unit, "backward": backward * unit}


def test_a_shard_of_megatron_fsdp_has_whole_rows_of_every_tensor() -> None:
    """Of 6 x 4 and 4 x 6 chunks are of 12; a bias of 5 may be cut anywhere."""
    here = sharded("megatron_fsdp")
    assert fsdp.shard_size(here, [(6, 4), (4, 6)], 2) == 24
    assert fsdp.shard_size(here, [(6, 4), (4, 6), (5, 1)], 2) == 36


def test_a_forward_pass_of_megatron_fsdp_gathers_the_first_layers_once_more() -> None:
    """Three of 233 million elements are the first to reach what it gathers ahead."""
    here = replace(sharded("megatron_fsdp"), phase="forward")
    gathers = [moved for moved in traffic.transfers(here, 0) if moved.kind == "all_gather"]
    assert sum(moved.calls for moved in gathers) == here.microbatches * here.layers + 2 + 3
    assert {moved.when for moved in gathers} == {"forward"}

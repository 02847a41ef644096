"""What must hold of predictions, whatever the model, the layout and the machine."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_helix.commands.plan import _layout
from megatron_helix.machine import hardware
from megatron_helix.machine.hardware import Hardware
from megatron_helix.planner import flops, memory, model_ends, parameters, search, traffic
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from tests.planner.planner_case import (
    DENSE,
    FEW,
    MACHINES,
    MOE,
    NARROW,
    SIXTEEN,
    SMALL,
    multiplied,
)

MODELS = {model.name: model for model in (DENSE, MOE, NARROW, FEW)}
PHASES = ("train", "prefill", "decode")


@cache
def candidates(model: str, phase: str) -> list[Deployment]:
    """What can be predicted: searched for by the process that runs a test of it, once."""
    return list(search.deployments(MODELS[model], SIXTEEN, SMALL, phase))


deployed = st.sampled_from(sorted(itertools.product(MODELS, PHASES))).flatmap(
    lambda key: st.sampled_from(candidates(*key))
)
overlaps = st.floats(0, 1)


def _hiding(machine: Hardware, part: float) -> Hardware:
    """The machine with so much of what its computation hides."""
    document = machine.model_dump()
    for each in document["beside"].values():
        each["hidden"] *= part
    return Hardware.model_validate(document)


machines = st.builds(
    _hiding, st.sampled_from([SIXTEEN, MACHINES["h100_nvl16"]]), st.sampled_from([0.0, 0.5, 1.0])
)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
def test_every_constant_says_where_it_is_from(machine: Hardware) -> None:
    links = [link for link in (machine.intra_node, machine.inter_node) if link]
    quantities = [machine.gemm, machine.memory, machine.memory_bandwidth]
    quantities += [quantity for link in links for quantity in (link.bandwidth, link.latency)]
    for quantity in quantities:
        assert quantity.source
        assert quantity.achieved == 1 or quantity.achieved_source


@given(deployed, machines, st.floats(1, 100), st.data())
def test_a_better_machine_is_never_slower(
    here: Deployment, machine: Hardware, factor: float, data: st.DataObject
) -> None:
    paths = [("gemm",), ("memory_bandwidth",), ("intra_node", "bandwidth")]
    if machine.inter_node:
        paths.append(("inter_node", "bandwidth"))
    better = multiplied(machine, *data.draw(st.sampled_from(paths)), factor=factor)
    before, after = predict(here, machine), predict(here, better)
    assert after.step_s <= before.step_s * (1 + 1e-12)


@given(deployed, machines, st.floats(1, 100))
def test_more_latency_is_never_faster(here: Deployment, machine: Hardware, factor: float) -> None:
    worse = multiplied(machine, "intra_node", "latency", factor=factor)
    assert predict(here, worse).step_s >= predict(here, machine).step_s * (1 - 1e-12)


@given(deployed, machines, overlaps, overlaps)
def test_more_overlap_is_never_slower(
    here: Deployment, machine: Hardware, first: float, second: float
) -> None:
    less, more = sorted((first, second))
    fast, slow = (predict(here, _hiding(machine, part)) for part in (more, less))
    assert fast.step_s <= slow.step_s * (1 + 1e-12)


@given(deployed, machines)
def test_nothing_is_above_the_roofline(here: Deployment, machine: Hardware) -> None:
    one = predict(here, machine)
    assert one.step_s >= one.bounds.roofline_s * (1 - 1e-12)
    # And of the whole machine, whatever the layout: its arithmetic at 100 %.
    assert one.step_s >= flops.useful(here) / (machine.gemm.peak * here.world_size)


@given(deployed, machines)
def test_the_terms_are_the_step(here: Deployment, machine: Hardware) -> None:
    one = predict(here, machine)
    parts = one.compute_s + one.communication_s + one.waiting_s + one.idle_s
    assert parts == pytest.approx(one.step_s)
    # Ranks of one stage differ in what comes once a step only.
    assert sum(term.seconds for term in one.terms) == pytest.approx(one.step_s, rel=0.02)
    assert min(one.compute_s, one.communication_s, one.waiting_s, one.idle_s) >= 0


@given(deployed, machines)
def test_memory_is_positive_and_holds_the_weights(here: Deployment, machine: Hardware) -> None:
    for stage in range(here.stages):
        need = memory.of_rank(here, stage, fused_channels=machine.fused_attention_max_channels)
        assert min(vars(need).values()) >= 0
        assert need.total >= need.weights > 0


@given(deployed)
def test_ranks_together_hold_the_model_once_a_replica(here: Deployment) -> None:
    """Matrices; norms, routers and the second copy of a tied embedding are replicas."""
    model = here.model
    held = 0
    for stage in range(here.stages):
        first, last = stage == 0, stage == here.stages - 1
        tensors = parameters.dense_tensors(here, first, last)
        whole = parameters.sequence_parallel(here, last)
        norms = sum(rows * columns for rows, columns in whole)
        held += (sum(tensors) - norms) * here.tp * here.layout.gtp
        held += sum(parameters.expert_tensors(here)) * here.layout.ep * here.layout.etp
    copies = 2 if here.stages > 1 else 1
    heads = model.num_attention_heads + model.query_groups
    attention = 2 * model.hidden_size * heads * model.kv_channels
    mlp = 2 * model.hidden_size * model.ffn_hidden_size * (model.num_experts or 1)
    whole = model.num_layers * (attention + mlp) + copies * here.vocabulary * model.hidden_size
    assert held == whole


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda model: model.name)
@pytest.mark.parametrize("exchange", ["activations", "weights", "scores", "auto"])
def test_one_segment_is_stock_term_by_term(model: ModelConfig, phase: str, exchange: str) -> None:
    beside = {"name": "one", "micro_batch": 4, "pp": 2}
    stock = LayoutConfig(tp=8, **beside)
    helix = LayoutConfig(m=1, n=8, exchange=exchange, **beside)
    one, other = (
        predict(Deployment(model, layout, SMALL, 16, phase).check(), SIXTEEN)
        for layout in (stock, helix)
    )
    assert one.terms == other.terms
    assert (one.step_s, one.tpot_ms, one.memory) == (other.step_s, other.tpot_ms, other.memory)


@given(st.deferred(lambda: st.sampled_from(candidates("dense", "train"))), st.integers(2, 4))
def test_more_micro_batches_send_in_proportion(here: Deployment, times: int) -> None:
    """What moves every micro-batch is symmetric in them; what moves once a step does not grow."""
    more = BatchConfig(sequences=SMALL.sequences * times, sequence_length=SMALL.sequence_length)
    assume(here.plan.gather == "microbatch")
    after = replace(here, batch=more)

    def sent(run: Deployment) -> tuple[Counter, Counter]:
        steps, rest = Counter(), Counter()
        for moved in traffic.transfers(run, 0):
            where = steps if moved.when == "step" else rest
            where[moved.axis, moved.kind] += moved.sent_bytes  # type: ignore[assignment]
        return steps, rest

    (once, each), (once_after, each_after) = sent(here), sent(after)
    assert once_after == once
    assert each_after == Counter({key: count * times for key, count in each.items()})


@given(deployed)
def test_ranks_of_a_stage_send_alike(here: Deployment) -> None:
    """All but the rank that broadcasts the batch, whatever their place in the layout.

    And but for the stream's pieces that a rank has already, where a sequence is dealt out: a time
    is of the ranks with most to send.
    """
    stage_ranks = here.world_size // here.stages
    sent = [traffic.step_bytes(here, rank) for rank in range(stage_ranks)]
    for one in sent:
        one.pop(("TENSOR_MODEL_PARALLEL_GROUP", "broadcast"), None)
    if here.plan.split == "sequence" and model_ends.converts(here, first=True, last=True):
        dealt = [one.pop(("HELIX_DIM_GROUP", "all_to_all"), 0.0) for one in sent]
        kinds = [(moved.axis, moved.kind, moved.sent_bytes) for moved in traffic.transfers(here, 0)]
        assert max(dealt) == sum(
            b for axis, kind, b in kinds if (axis, kind) == ("dim", "all_to_all")
        )
    assert all(one == sent[0] for one in sent)


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]),
    st.sampled_from([2, 4, 8, 16]),
    st.floats(0, 1e10),
)
def test_crossing_nodes_is_never_faster(kind: str, ranks: int, sent_bytes: float) -> None:
    machine = SIXTEEN.scaled(128)
    strides = [1, 2, 4, 8]
    times = [machine.seconds(kind, sent_bytes, 1, ranks, stride) for stride in strides]
    assert all(near <= far for near, far in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tp=8", "layout: micro_batch"),
        ("tp=8,wings=2,micro_batch=1", "layout: wings"),
        ("tp=8,m=2,n=4,micro_batch=1", "needs either tp"),
        ("tp=8,tp=4,micro_batch=1", "layout: tp is given twice"),
        ("tp8", "layout: tp8 must be a name of the table or KEY=VALUE"),
    ],
)
def test_a_bad_layout_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _layout(words)


@given(deployed)
def test_a_name_of_the_table_is_the_layout_again(here: Deployment) -> None:
    devices = here.world_size if here.phase == "train" else 0
    assert _layout(here.layout.name, training_on=devices) == here.layout


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3, "micro_batch": 1}, "must be a positive divisor of the number of ranks"),
        ({"tp": 8, "pp": 2, "micro_batch": 3}, "micro_batch x data-parallel ranks"),
        ({"m": 4, "n": 4, "gtp": 2, "micro_batch": 1}, "gtp"),
        ({"m": 4, "n": 4, "micro_batch": 2, "split": "batch"}, "multiple of --helix-m"),
        ({"tp": 16, "pp": 1, "cp": 2, "micro_batch": 1}, "the number of ranks"),
    ],
)
def test_a_layout_that_cannot_run_is_refused(layout: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Deployment(DENSE, LayoutConfig(name="bad", **layout), SMALL, 16).check()


def test_stock_ranks_beyond_the_query_groups_share_them() -> None:
    """Against two ranks, a group each: half the weights each, and as large a cache of a token."""
    two, four = (
        Deployment(FEW, LayoutConfig(name="stock", tp=tp, micro_batch=4), SMALL, 16).check()
        for tp in (2, 4)
    )
    assert parameters.layer_matrices(two) == 2 * parameters.layer_matrices(four)
    assert memory.cache_bytes_of_token(two) == memory.cache_bytes_of_token(four)
    assert any(one.layout.tp == 4 and one.layout.pp == 1 for one in candidates(FEW.name, "decode"))
    three = FEW.model_copy(update={"num_attention_heads": 48})
    with pytest.raises(ValueError, match=r"num_query_groups \(2\), got 3; choose a .* multiple"):
        Deployment(three, LayoutConfig(name="stock", tp=3, micro_batch=4), SMALL, 3).check()


def test_padded_features_count_as_those_that_are_stored() -> None:
    """But for the operations that nobody could avoid."""
    layout = LayoutConfig(name="uneven", m=4, n=4, exchange="weights", micro_batch=4)
    few, stored = (
        Deployment(
            DENSE.model_copy(update={"ffn_hidden_size": size}), layout, SMALL, 16, machine=SIXTEEN
        ).check()
        for size in (1001, 1008)
    )
    assert few.features == stored.features == 1008
    assert parameters.held(few, 0) == parameters.held(stored, 0)
    padded, even = (predict(here, SIXTEEN) for here in (few, stored))
    assert padded.terms == even.terms
    assert padded.memory == even.memory
    assert flops.useful(few) < flops.useful(stored)
    with pytest.raises(ValueError, match="ffn_hidden_size: must be at least the 16 ranks"):
        replace(few, model=DENSE.model_copy(update={"ffn_hidden_size": 15})).check()
    stock = LayoutConfig(name="stock", tp=16, micro_batch=4)
    with pytest.raises(ValueError, match="tp: must be a positive divisor of ffn_hidden_size"):
        replace(few, layout=stock).check()


def test_context_parallelism_without_fused_attention_is_refused() -> None:
    """No kernel of TransformerEngine's attends to 512 channels over several ranks."""
    layout = LayoutConfig(name="ring", tp=4, cp=4, micro_batch=1)
    wide = Deployment(DENSE, layout, SMALL, 16).check()
    with pytest.raises(ValueError, match=r"cp: needs fused attention.*at most 256, got 512; use 1"):
        predict(wide, SIXTEEN)
    assert any(here.layout.cp > 1 for here in candidates("narrow", "train"))
    assert not any(here.layout.cp > 1 for here in candidates("dense", "train"))


@pytest.mark.parametrize("gather", ["once", "step"])
def test_memory_grows_by_every_layer_that_keeps_its_weights(gather: str) -> None:
    """By its gathered weights and the sums of others' gradients.

    With the last one embedding and head are kept, too, and a copy is freed.
    """
    batch = BatchConfig(sequences=32, sequence_length=512)
    beside = {"name": gather, "m": 4, "n": 2, "exchange": "weights", "micro_batch": 4}

    def need(**keys: Any) -> float:
        layout = LayoutConfig.model_validate({**beside, **keys})
        here = Deployment(DENSE, layout, batch, 8, precision="fp32").check()
        return memory.of_rank(here, 0, fused_channels=256).gathered_weights

    some = [need(gather=gather, gather_layers=layers + 1) for layers in range(DENSE.num_layers)]
    bare = LayoutConfig.model_validate({**beside, "gather": gather})
    here = Deployment(DENSE, bare, batch, 8).check()
    kept = 4 * (4 + (3 if gather == "step" else 0))
    layer = kept * parameters.layer_matrices(here)
    ends = kept * 2 * math.prod(parameters.table(here))
    more = [after - before for before, after in itertools.pairwise([need(), *some])]
    assert more[:-1] == [layer] * (DENSE.num_layers - 1)
    copies = 3 if gather == "step" else 1  # the weight, and its gradient that goes and comes
    assert more[-1] == layer + ends - copies * need() / 3
    assert some[-1] == need(gather=gather) == need(gather=gather, gather_layers=99)


def test_a_layout_says_how_many_layers_keep_their_weights() -> None:
    """In its name, as in keys; a step takes less time by each of them."""
    words = "m=8,n=1,exchange=weights,gather=once,gather_layers={},micro_batch=4"
    made = [_layout(words.format(layers)) for layers in range(1, DENSE.num_layers + 1)]
    assert [layout.name for layout in made[:2]] == [
        *("helix_8x1_weights_once1_mb4", "helix_8x1_weights_once2_mb4"),
    ]
    assert [_layout(layout.name) for layout in made] == made
    every = _layout(words.format(1).replace(",gather_layers=1", ""))
    none = _layout("m=8,n=1,exchange=weights,micro_batch=4")
    batch, machine = BatchConfig(sequences=16, sequence_length=512), SIXTEEN.scaled(8)
    steps = [
        predict(Deployment(DENSE, layout, batch, 8).check(), machine).step_s
        for layout in (none, *made, every)
    ]
    assert steps[:-1] == sorted(set(steps), reverse=True)
    assert steps[-1] == steps[-2]


def test_one_gpu_is_near_what_was_measured_on_it() -> None:
    """One H100, TP=1, 4 sequences of 2048, fp16 (docs/log.md): 376.4 ms a training step."""
    layout = LayoutConfig(name="one", tp=1, micro_batch=1)
    batch = BatchConfig(sequences=4, sequence_length=2048)
    step = predict(Deployment(DENSE, layout, batch, 1).check(), MACHINES["h100_2"].scaled(1)).step_s
    assert step == pytest.approx(0.3764, rel=0.1)


def test_a_bad_hardware_file_is_refused(tmp_path: Path) -> None:
    source = Path("configs/hardware/h100_nvl16.yaml").read_text()
    path = tmp_path / "bad.yaml"
    for old, new, message in (
        ("unit: TFLOP/s", "unit: km/h", "gemm: .*unit must be one of TFLOP/s"),
        ("devices_per_node: 16", "devices_per_node: 8", "inter_node"),
        ("achieved: 0.70", "achieved: 7", "gemm.achieved"),
    ):
        path.write_text(source.replace(old, new))
        with pytest.raises(ValueError, match=message):
            hardware.load(path)

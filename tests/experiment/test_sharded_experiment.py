"""An experiment with a layout that shards weights: started, compared and verified as any other."""

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from megatron_helix import workflow
from megatron_helix.experiment import runs
from megatron_helix.planner.traffic import transfers
from megatron_helix.report import deployment_graph
from megatron_helix.verification import verify
from tests.covering import THOROUGH
from tests.experiment_case import DOCUMENT, experiment

TINY = {**DOCUMENT["models"][0], "untie_embeddings_and_output_weights": True}
LAYOUTS = [
    {"name": "dp4", "tp": 1, "distributed_optimizer": True, "micro_batch": 1},
    {"name": "fsdp4", "tp": 1, "fsdp": "torch_fsdp2", "micro_batch": 1},
    {"name": "helix_2x2", "m": 2, "n": 2, "ep": 4, "micro_batch": 4},
]
SHARDED = {
    "models": [{**TINY, "num_experts": 4}],
    "layouts": LAYOUTS,
    "phases": ["train", "prefill"],
    "claims": [],
    "steps": 2,
    "verification": {**DOCUMENT["verification"], "fp16": {"loss_scale": 1024.0}},
}


# Torch's, of the embedding: nothing in Megatron changes in place what it returns.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@THOROUGH
def test_fsdp_is_a_layout_of_an_experiment(tmp_path: Path) -> None:
    megatrons = {"name": "mfsdp4", "tp": 1, "fsdp": "megatron_fsdp", "micro_batch": 1}
    asked = {**SHARDED, "layouts": [*LAYOUTS, megatrons]}
    values = workflow.run(experiment(**asked), tmp_path, Console(quiet=True))
    checks = values["deployment_verification"]
    assert [check for check in checks if check["passed"] is False] == []
    said = {check["run"]: check for check in checks if check["check"] == "fp16"}
    assert said["tiny-fsdp4"]["passed"] is said["tiny-mfsdp4"]["passed"] is None
    assert said["tiny-dp4"]["passed"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"models": DOCUMENT["models"]},
            "tiny, layout fsdp4: fsdp: torch_fsdp2 needs untie_embeddings_and_output_weights",
        ),
        (
            {"precision": "fp16", "hardware": None},
            "tiny, layout fsdp4: fsdp: torch_fsdp2 trains in fp32 or bf16",
        ),
        (
            {"phases": ["decode"]},
            "tiny, layout fsdp4: cp, gtp, fsdp: are not predicted for decode",
        ),
        (
            {"layouts": [*LAYOUTS[:1], {**LAYOUTS[1], "tp": 2}]},
            r"tiny, layout fsdp4: etp: must be tp \(2\) with .* got 1; set etp to 2",
        ),
        (
            {
                "models": [TINY],
                "layouts": [*LAYOUTS[:1], {"name": "gtp4", "tp": 1, "gtp": 4, "micro_batch": 1}],
            },
            "tiny, layout gtp4: --tensor-parallel-num-weight-shards: GTP needs TransformerEngine",
        ),
        (
            {"layouts": [*LAYOUTS[:1], {"name": "cp4", "tp": 1, "cp": 4, "micro_batch": 1}]},
            "tiny, layout cp4: --context-parallel-size: needs TransformerEngine's attention",
        ),
        (
            {
                "layouts": [
                    *LAYOUTS[:1],
                    {"name": "a2a", "tp": 2, "cp": 2, "cp_comm_type": "a2a", "micro_batch": 1},
                ],
                "models": [{**TINY, "num_query_groups": 2}],
            },
            r"tiny, layout a2a: tp x cp \(a2a\): must be a positive divisor of num_query_groups",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(
    tmp_path: Path, changed: dict, said: str
) -> None:
    chosen = experiment(**{**SHARDED, "claims": [], **changed})
    with pytest.raises(ValueError, match=said):
        workflow.run(chosen, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


GQA = {**TINY, "num_query_groups": 4}
DRAWN = {
    "fsdp2": {"tp": 1, "fsdp": "torch_fsdp2"},
    "fsdp2 and tp": {"tp": 2, "fsdp": "torch_fsdp2"},
    "megatron fsdp": {"tp": 1, "fsdp": "megatron_fsdp"},
    "experts": {"tp": 1, "ep": 2, "fsdp": "megatron_fsdp"},
    "gtp": {"tp": 1, "gtp": 2},
    "gtp and tp": {"tp": 2, "gtp": 2},
    **{f"cp {kind}": {"tp": 1, "cp": 4, "cp_comm_type": kind} for kind in ("p2p", "all_gather")},
    "cp a2a": {"tp": 2, "cp": 2, "cp_comm_type": "a2a"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_graph_of_a_rival_sends_what_is_predicted(name: str) -> None:
    """Forward, but for the collectives of tokens at a model's ends, as of every layout."""
    model = {**GQA, "num_experts": 4} if name == "experts" else GQA
    layouts = [LAYOUTS[0], {"name": "drawn", "micro_batch": 1, **DRAWN[name]}]
    chosen = experiment(**{**SHARDED, "models": [model], "layouts": layouts})
    made = deployment_graph.build(chosen, layout="drawn")
    run = runs.Run(
        model=chosen.models[0], layout=chosen.layouts[1], phase="train", precision="fp32"
    )
    here = workflow.expectation.deployment(chosen, run)
    predicted: Counter[str] = Counter()
    for moved in transfers(here, 0):
        ends = ("batch", "embedding", "LM head", "cross entropy", "expert counts")
        if moved.when == "forward" and moved.what not in ends:
            predicted[moved.axis] += moved.sent_bytes  # type: ignore[assignment]
    for rank in range(4):
        sent: Counter[str] = Counter()
        for _, _, data in made.out_edges([n for n in made if n[0] == rank], data=True):
            if "bytes" in data:
                sent[data["axis"]] += data["bytes"] * here.microbatches
        if name == "experts":  # probabilities go to experts beside rows, and are not drawn
            sent["ep"] = predicted["ep"] = 0
        assert dict(sent) == pytest.approx(dict(predicted))


def test_the_baseline_saves_in_the_format_that_all_read() -> None:
    first = {**LAYOUTS[1], "fsdp": "megatron_fsdp"}
    with pytest.raises(ValueError, match="layouts: the first one makes the weights that all start"):
        experiment(**{**SHARDED, "layouts": [first, LAYOUTS[0]]})


def test_weights_are_those_computed_with_not_the_optimizers(tmp_path: Path) -> None:
    """Megatron FSDP shows the latter, in fp32, as its parameters."""
    asked = {
        **SHARDED,
        "models": [TINY],
        "world_size": 2,
        "layouts": [
            {"name": "dp2", "tp": 1, "distributed_optimizer": True, "micro_batch": 1},
            {"name": "mfsdp2", "tp": 1, "fsdp": "megatron_fsdp", "micro_batch": 1},
        ],
        "phases": ["train"],
        "precision": "bf16",
        "hardware": None,
        "verification": {"fp16": None},
        "tolerance": {"loss": 5e-3, "grad_norm": 5e-2},
    }
    values = workflow.run(experiment(**asked), tmp_path, Console(quiet=True))
    mapped = [one for one in values["deployment_verification"] if one["check"] == "mapping"]
    assert [one["passed"] for one in mapped] == [True, True], mapped
    whole, shards = (
        [rank["weight_bytes"] for rank in verify.placements(tmp_path / "runs" / name / "metrics")]
        for name in ("tiny-dp2", "tiny-mfsdp2")
    )
    assert sum(shards) == whole[0] == whole[1]

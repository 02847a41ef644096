"""CUDA graphs and a partition: what is refused, and that a step can be replayed at all."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_helix import pretrain_gpt
from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice
from megatron_helix.options import graphs
from megatron_helix.options.features.captured import captured
from megatron_helix.options.graphs import require_graphs
from tests.cpu_config import cpu_config
from tests.distributed import Curve, run_distributed, tiny_gpt, train

LEAVE = "or leave --cuda-graph-impl away$"
CAPTURED = [(impl, exchange) for impl, some in graphs.CAPTURED.items() for exchange in some]
BY_LAYER = "local"  # of the implementations, with activations
# For what is refused beside what is in the table, whatever it is.
ANY = {
    "local": ("activations",),
    "transformer_engine": ("activations",),
    "full_iteration": ("activations", "weights"),
}


def check(
    impl: str = BY_LAYER,
    exchange: str = "activations",
    split: str = "batch",
    gather: str = "microbatch",
    *,
    flags: Any = None,
    **changed: Any,
) -> None:
    """As a run whose config has these values, behind Megatron's own checks of them."""
    config = cpu_config(num_layers=1, hidden_size=64, num_attention_heads=4)
    for name, value in {"cuda_graph_impl": impl, "cuda_graph_modules": [], **changed}.items():
        setattr(config, name, value)
    require_graphs(
        Namespace(**(flags or {})), Choice(exchange=exchange, split=split, gather=gather), config
    )


def test_the_table_is_what_was_seen() -> None:
    stored = json.loads(Path("benchmarks/results/one_h200_exactness.json").read_text())["graphs"]
    found = {(row["impl"], row["exchange"]): row["found"] for row in stored}
    assert {case for case, what in found.items() if what == "equal"} == set(CAPTURED)
    failed = {case: what for case, what in found.items() if what != "equal"}
    assert failed.keys() == graphs.FAILED.keys()
    assert all(what in graphs.FAILED[case] for case, what in failed.items())


@pytest.mark.parametrize(("impl", "exchange"), CAPTURED)
def test_what_was_captured_is_let_through(impl: str, exchange: str) -> None:
    check(impl, exchange)


@pytest.mark.parametrize("exchange", ["auto", "weights", "scores"])
def test_a_run_without_graphs_is_not_asked(exchange: str) -> None:
    check("none", exchange, split="sequence", fp8="hybrid")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            {"exchange": "weights"},
            "^--helix-exchange: must be activations under --cuda-graph-impl local, got weights,"
            " whose capture fails with cudaErrorStreamCaptureInvalidated; use that, ",
        ),
        (
            {"exchange": "auto", "impl": "transformer_engine"},
            "^--helix-exchange: must be activations under --cuda-graph-impl transformer_engine,"
            " got auto, and nothing else has been captured there; ",
        ),
        (
            {"impl": "full_iteration", "exchange": "scores"},
            "^--helix-exchange: must be activations or weights under .* got scores, and nothing ",
        ),
        (
            {"split": "auto"},
            "^--helix-split: must be batch under .* local, .* got auto; use batch, ",
        ),
        (
            {"impl": "transformer_engine", "cuda_graph_warmup_steps": 0},
            "^--cuda-graph-warmup-steps: must be 1 or more, .* got 0; use more, ",
        ),
        (
            {"softmax_type": "learnable", "impl": "transformer_engine"},
            "^--softmax-type: the hook that sums an offset's gradient .* got learnable; leave it ",
        ),
        ({"flags": {"sft": True}}, "^--sft: documents are of other lengths in every replay, "),
        (
            {"flags": {"dataloader_inter_document_masking": True}, "impl": "full_iteration"},
            "^--dataloader-inter-document-masking: documents are of other lengths",
        ),
        ({"gather": "once"}, "^--helix-gather: it has not been run .* got once; leave it away, "),
        ({"fp8": "hybrid"}, "^--fp8-format: it has not been run .* got hybrid; "),
        ({"num_moe_experts": 4}, "^--num-experts: it has not been run .* got 4; "),
        ({"recompute_granularity": "full"}, "^--recompute-granularity: it has not been run "),
        ({"pipeline_model_parallel_size": 2}, "^--pipeline-model-parallel-size: .* got 2; "),
        ({"context_parallel_size": 2}, "^--context-parallel-size: it has not been run .* got 2; "),
        (
            {"cuda_graph_modules": [Namespace(name="attn")]},
            "^--cuda-graph-modules: parts of layers .* got attn; ",
        ),
    ],
)
def test_what_was_not_captured_is_refused_by_name(
    case: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURED", ANY)
    with pytest.raises(UserError, match=message + f".*{LEAVE}"):
        check(**case)


def test_an_implementation_that_has_captured_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(graphs.CAPTURED, BY_LAYER, ())
    with pytest.raises(UserError, match=f"^--cuda-graph-impl: local has not captured .*{LEAVE}"):
        check()
    assert BY_LAYER not in captured()


class Operations(TorchDispatchMode):
    """Every operation that is dispatched, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        self.seen.append((str(op), shapes))
        return op(*args, **(kwargs or {}))


def _steps(argv: list[str]) -> list[list[tuple[str, list[tuple[int, ...]]]]]:
    """What is dispatched in every step of a training."""
    steps: list[Operations] = []

    def before(model: Any, curve: Curve) -> None:
        steps.append(Operations())
        steps[-1].__enter__()

    def after(model: Any, curve: Curve) -> None:
        steps[-1].__exit__(None, None, None)

    train(argv, before=before, after=after)
    return [step.seen for step in steps]


def _read_by_the_host(step: list[tuple[str, Any]]) -> Counter[str]:
    """Operations whose result, or its shape, the host waits for."""
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    return Counter(op for op, _ in step if any(word in op for word in waits))


@pytest.mark.parametrize("exchange", ["activations", "weights"])
def test_a_step_is_a_replay_of_the_step_before(exchange: str, corpus_prefix: Path) -> None:
    """The same operations on the same shapes, and no value that the host reads beyond stock's."""
    helix = ("--helix-m", "2", "--helix-n", "1", "--helix-exchange", exchange)
    layouts = ((*helix, "--helix-split", "batch"), ("--tensor-model-parallel-size", "2"))
    found = []
    for layout in layouts:
        argv = tiny_gpt(corpus_prefix, *layout, "--sequence-parallel", train_iters=4)
        found.append(run_distributed(_steps, 2, pretrain_gpt.prepare(argv, 2)))
    for mine, stock in zip(*found, strict=True):
        assert mine[2] == mine[3]
        assert len(mine[3]) > 500
        assert _read_by_the_host(mine[3]) == _read_by_the_host(stock[3])

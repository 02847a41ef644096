"""Logits of a served checkpoint, prefill and every step, against those of the model that trained.

The model that trained gives its own in evaluation mode, for whole texts at once. The request has
one short prompt: the others are prefilled as far as it goes, and what is left of them is taken
token by token, from the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_helix import generate, pretrain_gpt
from megatron_helix.inference.requests import Request
from megatron_helix.inference.sampling import Sampling
from tests.covering import THOROUGH
from tests.distributed import launch_ranks, tiny_gpt

TEXTS = ("import", "from os import path as", "class Reader(object):\n", "def f(x, y, z=None):\n")
# Logits are of order one; a roundoff of 6e-8 and sums over a hundred terms in another order.
TOLERANCE = 1e-5
BF16 = 3e-2  # a roundoff of 4e-3

MODELS = {
    "windows": (
        *("--window-size", "4,0", "--window-attn-skip-freq", "2", "--no-rope-freq", "[1,0]"),
        *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm"),
        *("--attention-output-gate", "--softmax-type", "learnable", "--add-qkv-bias"),
        *("--disable-bias-linear", "--swiglu", "--normalization", "RMSNorm"),
        *("--norm-epsilon", "1e-2", "--rotary-percent", "0.5", "--rotary-base", "500"),
        *("--untie-embeddings-and-output-weights", "--mtp-num-layers", "1"),
    ),
    "rotary": (
        *("--window-size", "3,0", "--rotary-interleaved", "--use-rope-scaling"),
        *("--rotary-seq-len-interpolation-factor", "2", "--qk-l2-norm", "--squared-relu"),
        *("--softmax-type", "off-by-one", "--apply-query-key-layer-scaling"),
    ),
    "mup": (
        *("--position-embedding-type", "learned_absolute", "--use-mup"),
        *("--mup-base-hidden-size", "32", "--mup-embedding-mult", "2", "--mup-output-mult", "3"),
        *("--apply-residual-connection-post-layernorm", "--attention-dropout", "0.1"),
        *("--hidden-dropout", "0.1", "--kv-channels", "24"),
    ),
    "experts": (
        *("--num-experts", "4", "--moe-layer-freq", "[0,1]", "--moe-ffn-hidden-size", "96"),
        *("--moe-token-dispatcher-type", "alltoall", "--moe-router-pre-softmax"),
        *("--moe-router-num-groups", "2", "--moe-router-group-topk", "1"),
        *("--moe-router-topk-scaling-factor", "2.5", "--moe-router-score-function", "sigmoid"),
        *("--moe-router-enable-expert-bias", "--moe-router-dtype", "fp32"),
        *("--moe-shared-expert-intermediate-size", "64", "--moe-shared-expert-gate"),
        *("--moe-router-load-balancing-type", "none", "--moe-input-jitter-eps", "0.01"),
        *("--disable-bias-linear", "--position-embedding-type", "yarn", "--mscale", "0.7"),
        *("--rotary-scaling-factor", "4", "--yarn-original-max-position-embeddings", "8"),
        *("--yarn-beta-fast", "20", "--yarn-beta-slow", "2", "--quick-geglu"),
    ),
    "bf16": ("--bf16", "--window-size", "4,0"),
    # A vocabulary that every tensor-parallel size pads to another one: to 608 on one rank; and
    # features that six ranks do not divide.
    "odd": (
        *("--num-attention-heads", "9", "--group-query-attention", "--num-query-groups", "3"),
        *("--vocab-size", "599", "--ffn-hidden-size", "243"),
        "--untie-embeddings-and-output-weights",
    ),
}


@dataclass(frozen=True)
class Layout:
    """Ranks, and the flags that say how they share the model."""

    ranks: int
    flags: tuple[str, ...] = ()


SP = "--sequence-parallel"
LAYOUTS = {
    "tp1": Layout(1),
    "tp2": Layout(2, ("--tensor-model-parallel-size", "2")),
    "2x1": Layout(2, ("--helix-m", "2", "--helix-n", "1")),
    "1x2": Layout(2, ("--helix-m", "1", "--helix-n", "2", SP)),
    "2x2": Layout(4, ("--helix-m", "2", "--helix-n", "2", SP)),
    "2x1 weights": Layout(2, ("--helix-m", "2", "--helix-n", "1", "--helix-exchange=weights", SP)),
    "2x1 scores": Layout(2, ("--helix-m", "2", "--helix-n", "1", "--helix-exchange", "scores")),
    "ep2": Layout(
        2,
        (
            *("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
            *("--expert-tensor-parallel-size", "1", SP),
        ),
    ),
    "pp2": Layout(2, ("--pipeline-model-parallel-size", "2")),
}
LAYOUTS["2x3"] = Layout(6, ("--helix-m", "2", "--helix-n", "3", SP))  # padded to 672
LAYOUTS["tp3"] = Layout(3, ("--tensor-model-parallel-size", "3"))  # to 624
FEW = ("tp1", "tp2", "2x1", "1x2", "2x2")
CASES = [
    *((model, layout) for model in ("windows", "rotary", "mup", "experts") for layout in FEW),
    *(("windows", layout) for layout in ("2x1 weights", "2x1 scores", "pp2")),
    ("experts", "ep2"),
    *(("bf16", layout) for layout in ("tp1", "2x1", "pp2")),
    *(("odd", layout) for layout in ("tp1", "tp3", "2x3")),
]
SOON = [("windows", "2x1"), ("experts", "tp1")]
ROWS = [pytest.param(*case, marks=() if case in SOON else THOROUGH) for case in CASES]


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and what the model that saved it says to the texts: ``[b, s, V]``."""

    checkpoint: Path
    logits: torch.Tensor


def _tokens(texts: Sequence[str]) -> torch.Tensor:
    length = max(map(len, texts))
    return torch.tensor([[*text.encode(), *[0] * (length - len(text))] for text in texts])


def _train(argv: Sequence[str], file: Path) -> None:
    """Train on this rank, and keep the model's logits in evaluation mode."""
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    models: list[Any] = []
    set_up = training.setup_model_and_optimizer

    def set_up_and_keep(*args: Any, **kwargs: Any) -> Any:
        model, *others = set_up(*args, **kwargs)
        models.extend(model)
        return model, *others

    training.setup_model_and_optimizer = set_up_and_keep
    pretrain_gpt.train(argv)
    (model,) = unwrap_model(models)
    for module in model.modules():  # noise that Megatron does not turn off in evaluation
        if hasattr(module, "input_jitter"):
            module.config.moe_input_jitter_eps = None
    tokens = _tokens(TEXTS)
    with torch.no_grad():
        logits = model.eval()(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
    torch.save(logits.float(), file)


@pytest.fixture(scope="module")
def trained(
    corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """A few steps on one rank, once for each model; its weights large enough to tell."""
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            folder = tmp_path_factory.mktemp("trained")
            save = ("--save", str(folder / "checkpoint"), "--save-interval", "10")
            more = (*save, "--no-save-optim", "--init-method-std", "0.1", "--lr", "1e-2")
            flags = tiny_gpt(corpus_prefix, *more, *MODELS[name], train_iters=3)
            argv = pretrain_gpt.prepare(flags, 1)
            launch_ranks(_train, (argv, folder / "logits"), 1, folder / "logs")
            logits = torch.load(folder / "logits")
            done[name] = Trained(folder / "checkpoint", logits)
        return done[name]

    return train


Found = list[tuple[int, torch.Tensor]]  # (position of the token they are for, logits [b, V])


def _serve(jobs: Sequence[generate.Job], file: Path) -> None:
    """Serve one request after the other; the last rank keeps the logits of every step."""
    engine, parts = generate._start(jobs[0], Sampling())
    found: list[Found] = []
    for job in jobs:
        parts = generate._parts(job, engine.tp_size)
        steps = chain(engine.prefill(parts), engine.decode(parts))
        found.append([(step.position, step.logits) for step in steps])
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        torch.save(found, file)


def _job(checkpoint: Path, layout: Layout, prompts: Sequence[str]) -> generate.Job:
    request = Request(prompts=tuple(prompts), new_tokens=2)
    return generate.prepare(checkpoint, request, layout.flags, layout.ranks)


def known(found: Found, texts: Sequence[str]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Row, position of the last token, and logits, where all tokens up to there are the text's."""
    for position, logits in found:
        for row, text in enumerate(texts):
            if position <= len(text):
                yield row, position - 1, logits[row]


@pytest.mark.parametrize(("name", "layout"), ROWS)
def test_logits_are_those_of_the_model_that_trained(
    trained: Callable[[str], Trained], name: str, layout: str, tmp_path: Path
) -> None:
    """Four prompts, whose cache is cut by sequences, and three, whose cache is by positions."""
    model, ranks = trained(name), LAYOUTS[layout].ranks
    prompts = [" ".join(map(str, text.encode())) if name == "odd" else text for text in TEXTS]
    jobs = [_job(model.checkpoint, LAYOUTS[layout], prompts[:count]) for count in (4, 3)]
    launch_ranks(_serve, (jobs, tmp_path / "logits"), ranks, tmp_path / "logs")
    tolerance = BF16 if name == "bf16" else TOLERANCE
    for job, found in zip(jobs, torch.load(tmp_path / "logits"), strict=True):
        texts = TEXTS[: len(job.prompts)]
        assert job.vocabulary == (599 if name == "odd" else 256)
        compared = list(known(found, texts))
        assert len({last for _, last, _ in compared}) == max(map(len, texts)) - len(texts[0]) + 1
        for row, last, logits in compared:
            expected = model.logits[row, last, : job.vocabulary]
            error = (logits[: job.vocabulary] - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, f"{len(texts)} prompts, row {row}, position {last}"

"""Rollouts in the middle of a training: what they say, what they leave behind, what they take."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_helix import generate, pretrain_gpt
from megatron_helix.inference import saved_model
from megatron_helix.inference.engine import Engine, cache_bytes
from megatron_helix.inference.requests import Request
from megatron_helix.inference.sampling import Sampling
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.recording.comm_ledger import CommLedger, install
from megatron_helix.rollout import Completion, require, rollout
from tests import distributed
from tests.covering import fast
from tests.distributed import Curve, launch_ranks, run_distributed, tiny_gpt
from tests.live_bytes import LiveBytes

PROMPTS = ("import os\n", "def f(x):", "class", "for ")
NEW, STEPS, LAYERS = 8, 2, 4
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)
TOLERANCE = 1e-5  # log-probabilities are of order one, sums of some hundred terms in fp32
UNTIED = "--untie-embeddings-and-output-weights"  # else a token says itself again
SP = "--sequence-parallel"
DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-input-jitter-eps", "0.01", "--disable-bias-linear", "--expert-tensor-parallel-size=1"),
)
WEIGHTS = ("--helix-exchange", "weights", SP)
OVERLAPPED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
RECOMPUTED = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
REQUEST = Request(prompts=PROMPTS, new_tokens=NEW)
SERVED = ("2x2", "4x1 weights", "tp4", "pp2", "experts", "positions")
# Ranks, and flags.
CASES = {
    "2x1 step": (2, ("--helix-m", "2", "--helix-n", "1", *WEIGHTS, "--helix-gather", "step")),
    "2x2": (4, ("--helix-m", "2", "--helix-n", "2")),
    "4x1 weights": (4, ("--helix-m", "4", "--helix-n", "1", *WEIGHTS)),
    "tp4": (4, ("--tensor-model-parallel-size", "4", SP)),
    "pp2": (4, ("--helix-m", "2", "--helix-n", "1", "--pipeline-model-parallel-size", "2")),
    "dp2": (4, ("--helix-m", "2", "--helix-n", "1", *OVERLAPPED)),
    "recomputed": (4, ("--helix-m", "2", "--helix-n", "2", SP, *RECOMPUTED)),
    "experts": (4, ("--helix-m", "2", "--helix-n", "2", SP, *EXPERTS)),
    "mtp": (2, ("--helix-m", "2", "--helix-n", "1", "--mtp-num-layers", "1")),
    "positions": (
        2,
        ("--helix-m=2", "--helix-n=1", SP, "--position-embedding-type=learned_absolute"),
    ),
}


def tokens(texts: tuple[str, ...]) -> list[list[int]]:
    """Bytes."""
    return [list(text.encode()) for text in texts]


@dataclass
class Said:
    """What a rank saw of the rollouts after a step."""

    greedy: list[Completion]
    drawn: list[Completion]
    of_training: list[list[float]]  # log-probabilities of the greedy tokens by a training forward


@dataclass
class Seen:
    """What a rank saw of a training."""

    losses: list[float] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # collectives beside prefill and steps
    disturbed: list[str] = field(default_factory=list)


def train(argv: list[str], rolls: bool) -> Seen:
    """Train on this rank, with or without rollouts after every step."""
    seen = Seen()
    look = (lambda model, _: speak(model, seen)) if rolls else None
    seen.losses = distributed.train(argv, after=look).losses
    return seen


def speak(model: list[Any], seen: Seen) -> None:
    """Roll out, and look at everything around it."""
    before = state(model)
    with watched(seen.outside):
        greedy, drawn = (
            rollout(model, tokens(PROMPTS), new_tokens=NEW, sampling=one, end_token=0, policy=of)
            for one, of in ((GREEDY, "model"), (DRAWN, "sampled"))
        )
    after = state(model)
    seen.disturbed += [key for key in before if not same(before[key], after[key])]
    with generators_kept():  # of what is tried here, not of the rollout
        seen.said.append(Said(greedy, drawn, by_training(model, greedy)))
        if get_args().helix_gather == "step":
            in_the_middle_of_a_step(model, greedy)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators of the training as they are."""
    tracker = get_cuda_rng_tracker()
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    yield
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    tracker.set_states(states[2])


def state(model: list[Any]) -> dict[str, Any]:
    """All that a rollout must leave as it is."""
    found: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        **{f"tracker {k}": v.clone() for k, v in get_cuda_rng_tracker().get_states().items()},
        "config": dict(vars(model[0].config)),
    }
    for name, parameter in model[0].named_parameters():
        if not get_args().overlap_param_gather:  # else it waits for a forward to be gathered
            found[name] = parameter.detach().clone()
        found[f"{name} grad"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name} main_grad"] = parameter.main_grad.clone()
    for name, module in model[0].named_modules():
        found |= {f"{name}: {key}": value for key, value in vars(module).items()}
        for shared in ("helix_ends", "helix_vocabulary"):
            if hasattr(module, shared):
                found[f"{name}: {shared}"] = dict(vars(getattr(module, shared)))
    return found


def same(one: Any, other: Any) -> bool:
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one is other or one == other
    )


@contextlib.contextmanager
def watched(outside: list[str]) -> Iterator[None]:
    """Note the collectives that are neither of a prefill nor of a step."""
    ledger, inside = CommLedger(), Engine._pass

    def watch(self: Engine, part: Any, start: int, length: int) -> Any:
        outside.extend(call.kind for call in ledger.take_calls())
        result = inside(self, part, start, length)
        ledger.take_calls()
        return result

    uninstall, Engine._pass = install(ledger), watch
    try:
        yield
    finally:
        uninstall()
        Engine._pass = inside
    outside.extend(call.kind for call in ledger.take_calls())


def by_training(model: list[Any], completions: list[Completion]) -> list[list[float]]:
    """Log-probabilities of completions by a forward pass as training has it, without dropout."""
    if get_args().pipeline_model_parallel_size > 1:
        return []
    rows = torch.zeros(len(PROMPTS), get_args().seq_length + 1, dtype=torch.long)
    for row, prompt, one in zip(rows, tokens(PROMPTS), completions, strict=True):
        row[: len(prompt) + len(one.tokens)] = torch.tensor(prompt + one.tokens)
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(inputs.size(1)).expand_as(inputs)
    mask = torch.ones(inputs.size(1), inputs.size(1)).triu(1).bool()[None, None]
    (chunk,) = model
    noise, chunk.config.moe_input_jitter_eps = chunk.config.moe_input_jitter_eps, None
    with torch.no_grad():
        losses = chunk.eval()(inputs, positions, mask, labels=labels)
    chunk.train()
    chunk.config.moe_input_jitter_eps = noise
    return [
        (-row[len(prompt) - 1 :][: len(one.tokens)]).tolist()
        for row, prompt, one in zip(losses, tokens(PROMPTS), completions, strict=True)
    ]


def in_the_middle_of_a_step(model: list[Any], expected: list[Completion]) -> None:
    """Weights that a step has gathered and keeps are not asked for, and stay."""
    (chunk,) = model
    forms = (getattr(module, "forms", None) for module in chunk.modules())
    kept = [each.turned for each in forms if each is not None]
    assert kept
    assert all(weight._kept is None for weight in kept)
    inputs = torch.zeros(4, get_args().seq_length, dtype=torch.long)
    chunk(inputs, torch.arange(inputs.size(1)).expand_as(inputs), None, labels=inputs)
    whole = [weight._kept for weight in kept]
    assert all(one is not None for one in whole)
    again = rollout(model, tokens(PROMPTS), new_tokens=NEW, sampling=GREEDY, end_token=0)
    assert [one.tokens for one in again] == [one.tokens for one in expected]
    assert all(weight._kept is one for weight, one in zip(kept, whole, strict=True))
    finish_step([unwrap_model(chunk)])


def served(job: generate.Job, sampling: Sampling, ranks: int, folder: Path) -> list[list[int]]:
    """What ``helix generate`` says."""
    launch_ranks(_serve, (job, sampling, folder / "said"), ranks, folder / "logs")
    return json.loads((folder / "said").read_text())


def _serve(job: generate.Job, sampling: Sampling, file: Path) -> None:
    said: list[list[int]] = [[] for _ in PROMPTS]
    generate.serve(job, sampling, lambda row, token: said[row].append(token))
    if torch.distributed.get_rank() == 0:
        file.write_text(json.dumps(said))


def new(one: Completion) -> list[int]:
    """The tokens, without the one that ends them, which is not printed."""
    return one.tokens[:-1] if one.finish_reason == "stop" else one.tokens


@pytest.mark.parametrize("name", fast(["2x1 step"], CASES))
def test_a_training_with_rollouts(corpus_prefix: Path, tmp_path: Path, name: str) -> None:
    ranks, layout = CASES[name]
    save = ("--save", str(tmp_path / "saved"), "--save-interval", str(STEPS), "--no-save-optim")
    shape = ("--num-layers", str(LAYERS), "--init-method-std", "0.1", UNTIED)
    flags = tiny_gpt(corpus_prefix, *layout, *DROPOUT, *shape, *save, train_iters=STEPS)
    argv = pretrain_gpt.prepare(flags, ranks)
    plain = run_distributed(train, ranks, argv, False)
    seen = run_distributed(train, ranks, argv, True)

    # Everything is as before, and the training goes on as if nothing had been.
    assert [one.losses for one in seen] == [one.losses for one in plain]
    assert [one.disturbed for one in seen] == [[]] * ranks
    # Every rank says the same, and another seed or step something else.
    first = seen[0].said
    assert [said.greedy for said in first] == [said.greedy for said in seen[-1].said]
    assert [said.drawn for said in first] == [said.drawn for said in seen[-1].said]
    texts = [[one.tokens for one in x] for s in first for x in (s.greedy, s.drawn)]
    assert len(set(map(str, texts))) >= 3
    # A training forward finds the tokens as likely.
    for said in first if "--pipeline-model-parallel-size" not in layout else ():
        for one, expected in zip(said.greedy, said.of_training, strict=True):
            assert one.log_probs == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    # Nothing moves but in prefill and steps; of a pipeline, what its last stage found; and once a
    # step the weights that the next forward pass would have waited for.
    if "--pipeline-model-parallel-size" not in layout:
        moved = ["all_gather"] * STEPS if "--overlap-param-gather" in layout else []
        assert [one.outside for one in seen] == [moved] * ranks
    # The checkpoint of that moment says the same: on one stock rank, and under this layout.
    job = generate.prepare(tmp_path / "saved", REQUEST, (), 1)
    assert served(job, DRAWN, 1, tmp_path) == [new(one) for one in first[-1].drawn]
    if name in SERVED:
        job = generate.prepare(tmp_path / "saved", REQUEST, layout, ranks)
        assert served(job, GREEDY, ranks, tmp_path) == [new(one) for one in first[-1].greedy]


def memory(argv: list[str]) -> tuple[int, int]:
    """Bytes of the tensors that a rollout held at once on this rank, and of its cache of them."""
    found: list[tuple[int, int]] = []

    def look(model: list[Any], _: Curve) -> None:
        caches: list[int] = []
        inside = Engine._pass

        def watch(self: Engine, part: Any, start: int, length: int) -> Any:
            result = inside(self, part, start, length)
            caches.append(cache_bytes([part]))
            return result

        Engine._pass = watch
        try:
            with LiveBytes() as live:
                rollout(model, tokens(PROMPTS), new_tokens=NEW)
        finally:
            Engine._pass = inside
        found.append((live.peak, caches[-1]))

    distributed.train(argv, before=look)
    return found[0]


def test_a_rollout_holds_its_cache_and_one_working_copy(corpus_prefix: Path) -> None:
    """Before the first step, where no layer has a plan yet. All layers' weights would show."""
    layout = ("--helix-m", "2", "--helix-n", "1", *WEIGHTS)
    hidden, ffn = 64, 1024
    shape = ("--num-layers", str(LAYERS), "--ffn-hidden-size", str(ffn))
    argv = pretrain_gpt.prepare(tiny_gpt(corpus_prefix, *layout, *shape, train_iters=1), 2)
    one_layer = 4 * (4 * hidden * hidden + 2 * ffn * hidden)  # bytes, gathered over the dim group
    for peak, cache in run_distributed(memory, 2, argv):
        assert 0 < peak - cache <= one_layer


def test_parts_and_replicas(corpus_prefix: Path) -> None:
    """A batch in parts says the same where the likeliest is taken; replicas say their own."""
    layout = ("--helix-m", "2", "--helix-n", "1", "--init-method-std", "0.1", UNTIED)
    argv = pretrain_gpt.prepare(tiny_gpt(corpus_prefix, *layout, train_iters=1), 4)

    def speak_apart() -> tuple[Any, Any, Any]:
        said: list[Any] = []

        def look(model: list[Any], _: Curve) -> None:
            first = parallel_state.get_data_parallel_rank() == 0
            mine = tokens(PROMPTS if first else PROMPTS[:2])
            greedy = {"new_tokens": NEW, "sampling": GREEDY}
            said.append(rollout(model, mine, **greedy))
            said.append(rollout(model, mine, at_once=3 if first else 1, **greedy))
            ends = said[0][0].tokens[2]
            said.append(rollout(model, mine, end_token=ends, **greedy)[0])

        distributed.train(argv, before=look)
        return said[0], said[1], said[2]

    ranks = run_distributed(speak_apart, 4)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    for rank, size in ((ranks[0], 4), (ranks[2], 2)):
        whole, parts, ended = rank
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert len(whole) == size
        assert ended.finish_reason == "stop"
        assert ended.tokens == whole[0].tokens[: len(ended.tokens)]
        assert len(ended.tokens) <= 3
    assert [one.tokens for one in ranks[2][0]] == [one.tokens for one in ranks[0][0][:2]]


BAD = [
    ({"prompts": []}, "prompts: must be one or more, got none"),
    ({"prompts": [[]]}, "prompts: must have a token or more, and number 1 has none"),
    ({"prompts": [[1], [2] * 25]}, r"number 2 and 8 new tokens must fit the model's 32 .* 25 \+ 8"),
    ({"new_tokens": 0}, "new_tokens: must be 1 or more, got 0"),
    ({"at_once": 0}, "at_once: must be 1 sequence or more, got 0"),
    (
        {"prompts": [[1]] * 3, "split": "batch"},
        r"--helix-split: batch needs a multiple of .* got 3",
    ),
    ({"at_once": 3, "split": "batch"}, r"--helix-split: batch needs a multiple of .* got 3"),
    ({"flags": ("--multi-latent-attention",)}, "--multi-latent-attention: cannot generate"),
    ({"flags": ("--fp8-format", "hybrid")}, "generate from the checkpoint with helix generate"),
    ({"flags": ("--use-torch-fsdp2",)}, "--use-torch-fsdp2: cannot generate, the training has"),
    ({"flags": ("--context-parallel-size", "2")}, "--context-parallel-size: cannot generate"),
    ({"flags": ("--cuda-graph-impl", "local")}, "--cuda-graph-impl: cannot generate"),
    ({"flags": ("--num-experts", "4")}, "--moe-token-dispatcher-type: must be alltoall"),
    (
        {"flags": (*EXPERTS, "--expert-model-parallel-size", "4")},
        "--expert-model-parallel-size: must keep the experts within a tensor-parallel group",
    ),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_rolled_out_is_refused(given: dict[str, Any], message: str) -> None:
    flags = ("--helix-m", "2", "--helix-n", "1", "--tensor-model-parallel-size", "2")
    more = (*given.get("flags", ()), "--helix-split", given.get("split", "auto"))
    args = saved_model.parsed([*tiny_gpt(Path("corpus"), *flags), *more], argparse.Namespace())
    with pytest.raises(ValueError, match=message):
        require(
            args,
            given.get("prompts", [[1]] * 4),
            new_tokens=given.get("new_tokens", NEW),
            at_once=given.get("at_once"),
        )

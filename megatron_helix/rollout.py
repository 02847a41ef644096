"""Generate from the live model in the middle of its training, on the partition that it trains on.

Weights are read where they lie: no copy, no second layout, nothing to move before the first prefill
or after the last token. Prefill and decode are those of ``helix generate``
(:mod:`megatron_helix.inference.engine`), with its plans: ``weights`` moves weights where a prefill
has many tokens, ``activations`` tokens in a step that has few. Stock layouts roll out as well.

    from megatron_helix.rollout import rollout
    completions = rollout(model, prompts, new_tokens=64, end_token=0)

``model`` is the list of chunks as Megatron's loop has it, wrapped. Call it between two training
steps, on every rank: on those of a tensor-parallel group and of its pipeline with the same
arguments; data-parallel replicas may each have prompts and a seed of their own. On two H200 it
ran by the loop of ``examples/grpo`` (``benchmarks/rollout_turns.py``).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tokenizer

from megatron_helix.basics.errors import UserError
from megatron_helix.inference.engine import Engine, micro_batches
from megatron_helix.inference.sampling import Sampler, Sampling, log_probs
from megatron_helix.inference.transcript import Transcript
from megatron_helix.inference.undisturbed import undisturbed
from megatron_helix.inference.unserved import require_live, require_split
from megatron_helix.upstream import cpu_device

Policy = Literal["sampled", "model"]
AS_THE_MODEL_SAYS = Sampling(temperature=1.0)
Prompts = Sequence[Sequence[int]]
_Said = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [b]: tokens, log-probabilities, new ones


@dataclass(kw_only=True)
class Completion:
    """What was generated behind one prompt.

    Attributes:
        tokens: new ones; the one that ended the sequence is the last of them.
        log_probs: of each of the tokens, natural logarithms.
        finish_reason: ``stop`` at the end token, ``length`` where there was no room for more.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


def rollout(
    model: Sequence[torch.nn.Module],
    prompts: Prompts,
    *,
    new_tokens: int,
    sampling: Sampling = AS_THE_MODEL_SAYS,
    end_token: int | None = None,
    at_once: int | None = None,
    policy: Policy = "sampled",
) -> list[Completion]:
    """Complete ``prompts`` with the weights that ``model`` has now.

    Afterwards the training is as before: weights, gradients, the states of all random generators,
    the mode and the plan of every module.

    Args:
        model: Megatron's model chunks, wrapped or not.
        prompts: token ids of each. Prompts of like length are served fastest: the steps begin at
            the end of the shortest that is served with them.
        new_tokens: at most, for each prompt.
        sampling: how tokens are drawn; its seed decides, together with ``prompts`` and ``at_once``.
        end_token: a sequence ends with it; None if none does.
        at_once: sequences that are served together: as many as memory has room for the keys and
            values of. None serves all.
        policy: what ``log_probs`` are of: ``sampled`` is the distribution that tokens were drawn
            from, with temperature, top-k and top-p (if the likeliest is taken: that of the model
            among the tokens that may be drawn); ``model`` the model's at temperature 1 over its
            whole vocabulary, padding included, as the training loss has it.

    Returns:
        One completion for each prompt, equal on all ranks of a model.

    Raises:
        UserError: for what cannot be served; before anything is made or sent.
    """
    args = get_args()
    require(args, prompts, new_tokens=new_tokens, at_once=at_once)
    (stage,) = unwrap_model([*model])
    known = min(get_tokenizer().vocab_size, stage.vocab_size)
    _require_tokens(prompts, known)
    if policy not in ("sampled", "model"):
        raise UserError(f"policy: must be sampled or model, got {policy!r}; give one of them")
    sampler = sampling.sampler(next(stage.parameters()).device, known)
    _gather_what_is_due(model)
    with undisturbed(stage):
        engine = Engine(stage, sampler, live=True)
        served = [
            _serve(engine, part, new_tokens, end_token, sampler if policy == "sampled" else None)
            for part in _in_parts(prompts, at_once)
        ]
    return [*chain(*served)]


def require(
    args: argparse.Namespace, prompts: Prompts, *, new_tokens: int, at_once: int | None = None
) -> None:
    """Every refusal of a rollout that needs no model. Arguments as for :func:`rollout`.

    Args:
        args: Megatron's, validated or not.
        prompts: token ids of each.
        new_tokens: at most, for each prompt.
        at_once: sequences that are served together.

    Raises:
        UserError: naming what was required, what was given and what to do.
    """
    require_live(args, on_cpu=cpu_device.is_enabled())
    if new_tokens < 1:
        raise UserError(f"new_tokens: must be 1 or more, got {new_tokens}; give more")
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once: must be 1 sequence or more, got {at_once}; None serves all")
    if not prompts:
        raise UserError("prompts: must be one or more, got none; give some")
    limit = args.max_position_embeddings or args.seq_length
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(
                f"prompts: must have a token or more, and number {number} has none; leave it out"
            )
        if len(prompt) + new_tokens > limit:
            raise UserError(
                f"prompts: number {number} and {new_tokens} new tokens must fit the model's"
                f" {limit} positions (--max-position-embeddings), got {len(prompt)} +"
                f" {new_tokens}; give {max(0, limit - new_tokens)} tokens at most"
            )
    for part in _in_parts(prompts, at_once):
        require_split(args, len(part) // _micro_batches(part, args.pipeline_model_parallel_size))


@torch.no_grad()
def _gather_what_is_due(model: Sequence[torch.nn.Module]) -> None:
    """The weights that ``--overlap-param-gather`` leaves to the next forward pass, now.

    As Megatron does before it evaluates; the pass then finds them there.
    """
    for chunk in model:
        if not getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            continue
        ddp: Any = chunk
        for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def _require_tokens(prompts: Prompts, known: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        strange = [token for token in prompt if not 0 <= token < known]
        if strange:
            raise UserError(
                f"prompts: must be of the tokenizer's {known} tokens, and number {number} has"
                f" {strange[0]}; give ids of that tokenizer"
            )


def _in_parts(prompts: Prompts, at_once: int | None) -> list[Prompts]:
    size = at_once or len(prompts)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _micro_batches(part: Prompts, stages: int) -> int:
    """As many as the pipeline has stages, or as near as the sequences can be cut."""
    return math.gcd(len(part), stages)


def _serve(
    engine: Engine,
    prompts: Prompts,
    new_tokens: int,
    end_token: int | None,
    sampler: Sampler | None,
) -> list[Completion]:
    """The completions of prompts that are served together."""
    count = _micro_batches(prompts, engine.pp.size())
    parts = micro_batches(prompts, new_tokens, count=count, size=engine.tp_size)
    lengths = [len(prompt) for prompt in prompts]
    size = len(prompts) // count
    transcript = Transcript(lengths, new_tokens, size=size, end_token=end_token)
    said: list[list[_Said]] = [[] for _ in parts]
    for step in chain(engine.prefill(parts), engine.decode(parts, done=transcript.done)):
        fresh = transcript.fresh(step)
        if step.logits is None or not fresh.any():  # a first stage, or all prompts go on
            continue
        of_policy = sampler.log_probs if sampler else log_probs
        chances = of_policy(step.logits, step.tokens.to(step.logits.device))
        said[step.microbatch].append((step.tokens, chances, fresh))
    completions = [one for steps in said if steps for one in _completions(steps, end_token)]
    return _from_last_stage(completions, engine)


def _completions(steps: list[_Said], end_token: int | None) -> Iterator[Completion]:
    """Those of a micro-batch, read from the device once."""
    columns = zip(*steps, strict=True)
    tokens, chances, fresh = (torch.stack(column, dim=1).cpu() for column in columns)
    for row, of_row in enumerate(fresh):
        new = tokens[row, of_row].tolist()
        yield Completion(
            tokens=new,
            log_probs=chances[row, of_row].tolist(),
            finish_reason="stop" if new[-1] == end_token else "length",
        )


def _from_last_stage(completions: list[Completion], engine: Engine) -> list[Completion]:
    """What only the ranks that have logits know, on all ranks of the pipeline."""
    if engine.pp.size() == 1:
        return completions
    said: list[Any] = [completions]
    dist.broadcast_object_list(said, src=engine.stages[-1], group=engine.pp)
    return said[0]

"""Text while training: what the model says to some prompts, after every so many steps.

The simplest user of :mod:`megatron_helix.rollout`: tokens are the likeliest, so that what changes
from step to step is the model. The first rank prints them into the log; with ``--helix-metrics``
they are kept beside what is measured there, and an experiment's report shows them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.inference.requests import read_prompts, token_ids, tokenizer_of
from megatron_helix.upstream import patches

FILE = "samples.jsonl"
_PROMPTS = "--helix-sample-prompts"


def require(args: argparse.Namespace) -> list[list[int]]:
    """The token ids of the prompts that the flags name; none where they ask for no samples.

    Args:
        args: Megatron's, with the helix flags, validated or not.

    Raises:
        UserError: for flags that go together and do not, and for prompts that cannot be served.
    """
    interval, file, new_tokens = (
        getattr(args, f"helix_sample_{name}") for name in ("interval", "prompts", "tokens")
    )
    if interval is None and file is None:
        return []
    if interval is None or file is None:
        given, missing = "--helix-sample-interval", _PROMPTS
        if interval is None:
            given, missing = missing, given
        raise UserError(f"{given}: goes with {missing}, got none; give both, or neither")
    if interval < 1:
        raise UserError(
            f"--helix-sample-interval: must be 1 step or more, got {interval}; give more"
        )
    if new_tokens < 1:
        raise UserError(f"--helix-sample-tokens: must be 1 or more, got {new_tokens}; give more")
    texts = read_prompts((), file, field=_PROMPTS)
    if not texts or not all(texts):
        what = "has none" if not texts else f"has none on line {texts.index('') + 1}"
        raise UserError(
            f"{_PROMPTS}: must have a prompt on every line, and {file} {what}; correct the file"
        )
    tokenizer = tokenizer_of(args)
    prompts = [token_ids(text, n, tokenizer, field=_PROMPTS) for n, text in enumerate(texts, 1)]
    limit = args.max_position_embeddings or args.seq_length
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + new_tokens > limit:
            raise UserError(
                f"{_PROMPTS}: every prompt and --helix-sample-tokens {new_tokens} must fit the"
                f" model's {limit} positions (--max-position-embeddings), and line {number} of"
                f" {file} has {len(prompt)} tokens; shorten it, or ask for"
                f" {max(0, limit - len(prompt))} tokens at most"
            )
    from megatron_helix import rollout  # slow: it imports Megatron

    rollout.require(args, _filled(args, prompts), new_tokens=new_tokens)
    return prompts


def _filled(args: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts, and the first again as often as the split of training, of batches, needs."""
    cut = 1
    if args.helix_split == "batch":
        cut = (args.helix_m or 1) * args.pipeline_model_parallel_size
    return [*prompts, *[prompts[0]] * (-len(prompts) % cut)]


def install(args: argparse.Namespace) -> None:
    """Continue the prompts after every so many training steps, from now on.

    Args:
        args: Megatron's, validated, which ask for samples.
    """
    from megatron_helix.inference.sampling import Sampling
    from megatron_helix.rollout import rollout

    prompts, tokenizer = require(args), tokenizer_of(args)
    end_token = getattr(tokenizer, "eod", None)

    def observed(train_step: Callable[..., Any], *step: Any, iteration: int, **more: Any) -> Any:
        result = train_step(*step, iteration=iteration, **more)
        if (iteration + 1) % args.helix_sample_interval == 0:
            completions = rollout(
                step[2],
                _filled(args, prompts),
                new_tokens=args.helix_sample_tokens,
                sampling=Sampling(),
                end_token=end_token,
            )
            if args.rank == 0:
                texts = [
                    tokenizer.detokenize([*filter(lambda token: token != end_token, one.tokens)])
                    for one in completions[: len(prompts)]
                ]
                _tell(args, iteration + 1, [tokenizer.detokenize(ids) for ids in prompts], texts)
        return result

    patches.observe_train_step(observed)


def _tell(
    args: argparse.Namespace, step: int, prompts: Sequence[str], texts: Sequence[str]
) -> None:
    said = [
        {"step": step, "prompt": prompt, "text": text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    for one in said:
        print(f"sample after step {step}: {one['prompt']!r} -> {one['text']!r}", flush=True)
    if args.helix_metrics:
        with (args.helix_metrics / FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in said)


def read(folder: Path) -> list[dict[str, Any]]:
    """What a run said, by step; of a step that a restart has done again, what it said last."""
    file = folder / FILE
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    said = {(one["step"], one["prompt"]): one for one in map(json.loads, whole)}
    return [said[key] for key in sorted(said, key=lambda key: key[0])]

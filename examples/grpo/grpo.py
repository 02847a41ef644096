"""GRPO with a verifiable reward: one model, one partition, rollouts and updates by turns.

Group-relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1, without the term
that holds the model near a reference): every prompt is answered several times; an answer's
advantage is its reward less the mean of its group, over the group's standard deviation; the loss is
PPO's clipped one, over all tokens of a turn alike.

    python examples/grpo/grpo.py --out runs/grpo -- --helix-m 4 --helix-n 1 --sequence-parallel

Flags behind ``--`` are the layout, Megatron's or helix's, and win over those here.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import report
import task
import torch
from rows import Row, Written, pack

from megatron_helix import pretrain_gpt
from megatron_helix.basics import errors
from megatron_helix.basics.errors import UserError
from megatron_helix.inference.sampling import Sampling
from megatron_helix.launching import fork_ranks
from megatron_helix.launching.failures import RunFailed

END = 0  # the byte that ends an answer
CLIP = 0.2  # of the ratio of probabilities, as in PPO
LAYOUT = ("--helix-m", "4", "--helix-n", "1", "--sequence-parallel")


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the flags behind ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder for curves and report.")
    parser.add_argument("--ranks", type=int, default=4, help="CPU ranks.")
    parser.add_argument("--start", type=int, default=40, help="Supervised steps before.")
    parser.add_argument("--turns", type=int, default=80, help="Rollouts and updates.")
    parser.add_argument("--prompts", type=int, default=16, help="Of a turn and replica.")
    parser.add_argument("--group", type=int, default=8, help="Answers to a prompt.")
    parser.add_argument("--at-once", type=int, help="Answers that are written at a time.")
    parser.add_argument("--width", type=int, default=128, help="Of the model.")
    parser.add_argument("--layers", type=int, default=2, help="Of the model.")
    parser.add_argument("--start-lr", type=float, default=1e-3, help="Of the start.")
    parser.add_argument("--lr", type=float, default=5e-4, help="Of the turns.")
    parser.add_argument("--seed", type=int, default=1, help="Of weights, problems and answers.")
    return parser.parse_args(argv[:end]), [*argv[end + 1 :]]


def flags(options: argparse.Namespace, layout: Sequence[str]) -> list[str]:
    """Megatron's flags: a byte-level model, and rows that hold about 48 answers."""
    length = -(-48 * task.LONGEST // 32) * 32
    width = options.width
    return [
        *(
            "--helix-device",
            "cpu",
            "--num-layers",
            str(options.layers),
            "--hidden-size",
            str(width),
        ),
        *("--num-attention-heads", "4", "--ffn-hidden-size", str(4 * width)),
        *("--position-embedding-type", "rope", "--disable-bias-linear"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
        *("--null-tokenizer-eod-id", str(END), "--make-vocab-size-divisible-by", "16"),
        *("--seq-length", str(length), "--max-position-embeddings", str(length)),
        *("--micro-batch-size", "1", "--global-batch-size", "64", "--train-iters", "1000000"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--calculate-per-token-loss"),
        *("--lr", str(options.lr), "--lr-decay-style", "constant", "--seed", str(options.seed)),
        *("--mock-data", "--eval-iters", "0", "--rerun-mode", "disabled"),
        *(layout or LAYOUT),
    ]


def main(argv: Sequence[str]) -> None:
    """Train on forked ranks, and write the report."""
    options, layout = parsed(argv)
    try_reward(random.Random(options.seed))
    completed = pretrain_gpt.prepare(flags(options, layout), options.ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    ranks = fork_ranks.Ranks(
        target=rank,
        args=(options, completed),
        world_size=options.ranks,
        logs=options.out / "logs",
    )
    try:
        fork_ranks.run(ranks)
    except RunFailed as failure:
        errors.leave(failure, 1)
    print(report.write(options.out, [options.out]))


def try_reward(dice: random.Random) -> None:
    """A good answer, a bad one and none: what each is worth must be a number.

    Raises:
        UserError: before any rank is started.
    """
    prompt = task.problem(dice)
    for answer in (task.solution(prompt), prompt, ""):
        finite(task.reward(prompt, answer))


def rank(options: argparse.Namespace, completed: Sequence[str]) -> None:
    """One rank; a mistake of the user's is the last line of its log."""
    with errors.told():
        learn(options, completed)


def learn(options: argparse.Namespace, completed: Sequence[str]) -> list[dict[str, Any]]:
    """One rank: the start, the turns, and a line for each of them by the first rank."""
    from megatron.core import parallel_state
    from megatron.training import get_args

    model, optimizer = set_up(completed)
    replica = parallel_state.get_data_parallel_rank()
    dice = random.Random(1000 * options.seed + replica)
    lines = []
    set_rate(optimizer, options.start_lr)
    for _ in range(options.start):
        update(model, optimizer, pack(shown(dice, 32), get_args().seq_length))
    set_rate(optimizer, options.lr)
    for turn in range(1, options.turns + 1):
        start = time.perf_counter()
        seed = (1000 * options.seed + replica) * 1_000_000 + turn
        written, rewards = answers(model, options, dice, seed)
        rolled = time.perf_counter()
        gaps = update(model, optimizer, pack(written, get_args().seq_length))
        line = {
            "turn": turn,
            "reward": mean_of_replicas(rewards),
            "length": mean_of_replicas([len(one.answer) for one in written]),
            **({"gap": mean_of_replicas(gaps)} if gaps else {}),
            "rollout_s": rolled - start,
            "update_s": time.perf_counter() - rolled,
        }
        lines.append(line)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
            with (options.out / report.TURNS).open("a" if turn > 1 else "w") as file:
                file.write(json.dumps(line) + "\n")
    return lines


def set_up(completed: Sequence[str]) -> tuple[list[Any], Any]:
    """Megatron's model and optimizer, as its own loop makes them, with helix in the model."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    pretrain_gpt.adapt_megatron(completed)
    sys.argv = [sys.argv[0], *completed]
    args = parse_and_validate_args(extra_args_provider=pretrain_gpt.flags_beside())
    model_config = pretrain_gpt.turn_on(args, gpt_config_from_args(args))
    initialize_megatron()
    model, optimizer, _scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    if config.finalize_model_grads_func is None:  # --helix-gather step brings its own
        config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer


def set_rate(optimizer: Any, rate: float) -> None:
    """The learning rate from now on: Megatron's scheduler would set it otherwise."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def shown(dice: random.Random, count: int) -> list[Written]:
    """Solved problems for the supervised start."""
    prompts = [task.problem(dice) for _ in range(count)]
    return [
        Written(
            prompt=list(prompt.encode()),
            answer=[*task.solution(prompt).encode(), END],
            log_probs=[],
            advantage=1.0,
        )
        for prompt in prompts
    ]


def answers(
    model: list[Any], options: argparse.Namespace, dice: random.Random, seed: int
) -> tuple[list[Written], list[float]]:
    """What the model writes to new problems, with its advantages, and the rewards."""
    from megatron_helix.rollout import rollout

    problems = [task.problem(dice) for _ in range(options.prompts)]
    prompts = [problem for problem in problems for _ in range(options.group)]
    ids = [list(prompt.encode()) for prompt in prompts]
    completions = rollout(
        model,
        ids,
        new_tokens=task.NEW_TOKENS,
        sampling=Sampling(temperature=1.0, seed=seed),
        end_token=END,
        at_once=options.at_once,
    )
    rewards = [
        finite(task.reward(prompt, bytes(one.tokens).decode(errors="replace").rstrip("\0")))
        for prompt, one in zip(prompts, completions, strict=True)
    ]
    written = [
        Written(prompt=prompt, answer=one.tokens, log_probs=one.log_probs, advantage=advantage)
        for prompt, one, advantage in zip(
            ids, completions, advantages(rewards, options.group), strict=True
        )
    ]
    return written, rewards


def finite(value: Any) -> float:
    """A reward that is a number.

    Raises:
        UserError: for any other.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"reward: must be a finite number, got {value!r}; correct task.reward")
    return float(value)


def advantages(rewards: Sequence[float], group: int) -> Iterator[float]:
    """Of every answer in its group; 0 where all of a group are alike."""
    for start in range(0, len(rewards), group):
        own = rewards[start : start + group]
        mean, deviation = statistics.mean(own), statistics.pstdev(own)
        yield from ((one - mean) / deviation if deviation else 0.0 for one in own)


def update(model: list[Any], optimizer: Any, rows: list[Row]) -> list[float]:
    """One step of the optimizer, a row a micro-batch.

    Returns:
        Of every row, how far the log-probability of a token is from what the rollout said, on
        average: rounding, for these weights wrote it. Nothing before a pipeline's last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=len(rows),
        seq_length=get_args().seq_length,
        micro_batch_size=len(rows[0].tokens),
    )
    optimizer.step()
    return [float(one["gap"]) for one in found]


def forward_step(rows: Iterator[Row], model: Any) -> tuple[torch.Tensor, Any]:
    """A row through the model: the loss of every token, and what makes the turn's of them."""
    row = next(rows)
    losses = model(row.tokens, row.positions, None, labels=row.labels, packed_seq_params=row.packed)
    return losses, partial(policy_loss, row)


def policy_loss(
    row: Row, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed over the answers' tokens, their number, and the mean gap to the rollout's.

    Where nothing was drawn, in the supervised start, the ratio is one, and its gradient that of
    the cross entropy.

    Args:
        row: tensors ``[b, s]``.
        losses: of its tokens, ``[b, s]``.
    """
    now = -losses.float()
    drawn = torch.where(row.log_probs.isnan(), now.detach(), row.log_probs)
    ratio = torch.exp(now - drawn)
    gain = torch.minimum(ratio * row.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * row.advantages)
    loss = -(gain * row.mask).sum()
    gap = ((now.detach() - drawn).abs() * row.mask).sum()
    tokens = row.mask.sum()
    return loss, tokens.to(torch.int), {"gap": gap / tokens}


def mean_of_replicas(values: Sequence[float]) -> float:
    """The mean over all data-parallel replicas."""
    from megatron.core import parallel_state

    total = torch.tensor([sum(values), len(values)], dtype=torch.float64).cuda()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])


if __name__ == "__main__":
    with errors.told():
        main(sys.argv[1:])

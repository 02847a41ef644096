"""One rank of ``rollout_turns.py``: ``torchrun ... -m rollout_rank CASE.json``.

Turns of the loop of ``examples/grpo`` on random prompts of one length, answers of one length, so
that every turn costs the same and rows need no packing. The first turn warms up and is counted by
the ledger; the others are timed without it, the device waited for before and after.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gated
from pydantic import BaseModel, ConfigDict

from megatron_helix import pretrain_gpt
from megatron_helix.basics import errors

GATE = "go"
EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo"


class Case(BaseModel):
    """What a layout's ranks do.

    Attributes:
        flags: Megatron's, of model and layout.
        resharded: whether rollouts are by a second model, cut over all ranks as TP.
        turns: timed, after the one that warms up.
        prompts: of a turn, of all replicas together.
        group: answers to a prompt.
        prompt_length: tokens.
        new_tokens: of an answer.
        out: folder that takes ``rank0.json`` and so on; the ranks wait for its file ``go``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: list[str]
    resharded: bool
    turns: int
    prompts: int
    group: int
    prompt_length: int
    new_tokens: int
    out: Path


def main(file: Path) -> None:
    """Measure; figures of every turn go to a file of this rank."""
    case = Case.model_validate_json(file.read_text())
    sys.path.insert(0, str(EXAMPLE))
    completed = pretrain_gpt.prepare_rank(case.flags, script=False)
    import grpo  # pyright: ignore[reportMissingImports]

    gated.wait(case.out / GATE)
    with errors.told():
        model, optimizer = grpo.set_up(completed)
    import torch.distributed as dist

    found: dict[str, list[float]] = {}
    for figures in turns(case, model, optimizer):
        for key, value in figures.items():
            found.setdefault(key, []).append(value)
    (case.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def turns(case: Case, model: list[Any], optimizer: Any) -> Iterator[dict[str, float]]:
    """The figures of every turn but the first."""
    import grpo  # pyright: ignore[reportMissingImports]
    import torch
    from megatron.core import parallel_state
    from megatron.training import get_args

    from megatron_helix.recording.comm_ledger import CommLedger, install

    target = generating_model() if case.resharded else None
    reshard(model, target)  # its plan is made once
    replica = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    own = slice(replica * case.prompts // replicas, (replica + 1) * case.prompts // replicas)
    sent: dict[str, float] = {}
    ledger = CommLedger()
    uninstall = install(ledger)
    for turn in range(case.turns + 1):
        prompts = drawn(case, turn)
        served = prompts if target else prompts[own]
        chunks = [target] if target else model
        seed = 1000 * turn + (0 if target else replica)
        held = torch.cuda.memory_allocated()
        _, switch_s, _ = timed(partial(reshard, model, target))
        switch_bytes = total(ledger)
        written, rollout_s, rollout_peak = timed(partial(answers, case, chunks, served, seed))
        rollout_bytes = total(ledger)
        if target:
            written = written[own.start * case.group : own.stop * case.group]
        rows = rectangles(written, get_args().micro_batch_size)
        gaps, update_s, update_peak = timed(partial(grpo.update, model, optimizer, rows))
        if not turn:
            uninstall()
            sent = {"switch_bytes": switch_bytes, "rollout_bytes": rollout_bytes}
            continue
        yield {
            "switch_s": switch_s,
            "rollout_s": rollout_s,
            "update_s": update_s,
            "turn_s": switch_s + rollout_s + update_s,
            **sent,
            "second_model_bytes": weight_bytes(target) if target else 0,
            "held_bytes": held,
            "rollout_peak_bytes": rollout_peak,
            "update_peak_bytes": update_peak,
            "gap": sum(gaps) / len(gaps),
        }


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result, seconds and peak memory of some work that all ranks begin together.

    Memory is what tensors took on a GPU; on a CPU the most that the process ever had resident.
    """
    import torch

    torch.distributed.barrier()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result, seconds, torch.cuda.max_memory_allocated() or resident


def total(ledger: Any) -> float:
    """Bytes that this rank has sent since it was last asked."""
    return sum(entry.sent_bytes for entry in ledger.take().values())


def drawn(case: Case, turn: int) -> list[list[int]]:
    """Random prompts; the same on all ranks."""
    from megatron.training import get_args

    dice, known = random.Random(turn), get_args().vocab_size
    return [[dice.randrange(known) for _ in range(case.prompt_length)] for _ in range(case.prompts)]


def answers(case: Case, chunks: list[Any], prompts: list[list[int]], seed: int) -> list[Any]:
    """What the model writes; an even token earns a point."""
    import grpo  # pyright: ignore[reportMissingImports]
    from rows import Written  # pyright: ignore[reportMissingImports]

    from megatron_helix.inference.sampling import Sampling
    from megatron_helix.rollout import rollout

    asked = [prompt for prompt in prompts for _ in range(case.group)]
    sampling = Sampling(temperature=1.0, seed=seed)
    said = rollout(chunks, asked, new_tokens=case.new_tokens, sampling=sampling)
    rewards = [sum(1 - token % 2 for token in one.tokens) / case.new_tokens for one in said]
    advantages = grpo.advantages(rewards, case.group)
    return [
        Written(prompt=prompt, answer=one.tokens, log_probs=one.log_probs, advantage=advantage)
        for prompt, one, advantage in zip(asked, said, advantages, strict=True)
    ]


def rectangles(written: list[Any], size: int) -> list[Any]:
    """Micro-batches ``[size, s]``: all sequences have one length, s, and no loss is of the last."""
    import torch
    from rows import Row  # pyright: ignore[reportMissingImports]

    whole = torch.tensor([one.prompt + one.answer for one in written])
    new = torch.tensor([one.log_probs for one in written])
    before = whole.size(1) - new.size(1) - 1

    def of_labels(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (before, 1))

    columns = {
        "tokens": whole,
        "labels": whole.roll(-1, dims=1),
        "positions": torch.arange(whole.size(1)).expand_as(whole),
        "mask": of_labels(torch.ones_like(new)),
        "advantages": of_labels(torch.tensor([[one.advantage] for one in written]).expand_as(new)),
        "log_probs": of_labels(new),
    }
    parts = {key: values.cuda().split(size) for key, values in columns.items()}
    return [Row(**dict(zip(parts, row, strict=True))) for row in zip(*parts.values(), strict=True)]


def reshard(model: list[Any], target: Any) -> None:
    """Megatron's: the weights that are trained into the model that generates."""
    if target is None:
        return
    import torch.distributed as dist
    from megatron.core.resharding import swap_model_weights

    swap_model_weights(
        model, target, refit_method="nccl" if dist.get_backend() == "nccl" else "gloo"
    )


def generating_model() -> Any:
    """The same model as TP over all ranks, without sequence parallelism, on groups of its own."""
    import torch
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args
    from megatron.training.argument_utils import gpt_config_from_args

    everyone = dist.new_group(range(dist.get_world_size()))
    singles = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = singles[dist.get_rank()]
    names = ("pp", "cp", "ep", "dp", "dp_cp", "expt_dp", "embd", "pos_embd", "tp_dp_cp")
    groups = ProcessGroupCollection(
        **dict.fromkeys(("tp", "mp", "tp_cp", "expt_tp", "tp_ep", "tp_ep_pp"), everyone),
        **dict.fromkeys(names, alone),
    )
    config = gpt_config_from_args(get_args())
    config.transformer.tensor_model_parallel_size = dist.get_world_size()
    config.transformer.sequence_parallel = False
    model: torch.nn.Module = config.get_builder_cls()(config).build_model(groups)
    return model.cuda().eval()


def weight_bytes(model: Any) -> int:
    """Of this rank."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

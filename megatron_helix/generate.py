"""Generate text from a checkpoint under any layout, stock or helix, or measure what that costs.

:func:`prepare` makes a job of a request or refuses it, before any process group exists;
:func:`serve` and :func:`measure` do it on one rank. The tokens come from rank 0, which is on the
first pipeline stage.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_helix import pretrain_gpt
from megatron_helix.inference import saved_model
from megatron_helix.inference.requests import Request, tokenizer_of
from megatron_helix.inference.transcript import Transcript
from megatron_helix.inference.unserved import require_served, require_split
from megatron_helix.options import arguments, spelling
from megatron_helix.upstream import patches

Emit = Callable[[int, int], Any]  # (sequence, token)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that a layout can serve.

    Attributes:
        flags: Megatron's and helix's, completed, without the model's.
        saved: the arguments that the model was trained with.
        request: what was asked.
        prompts: its token ids.
        tokenizer: of the model.
        vocabulary: tokens that the model can draw.
    """

    flags: list[str]
    saved: argparse.Namespace
    request: Request
    prompts: list[list[int]]
    tokenizer: Any
    vocabulary: int


def prepare(
    checkpoint: Path, request: Request, flags: Sequence[str], world_size: int, device: str = "cpu"
) -> Job:
    """Everything before the first process group.

    Args:
        checkpoint: the folder that training had as ``--save``.
        request: what to generate.
        flags: the layout: Megatron's parallel sizes, or the helix flags. The model's flags come
            from the checkpoint.
        world_size: ranks.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: for what this model or layout cannot serve.
    """
    spelling.require_spelt(flags)
    saved_model.require_checkpoint(checkpoint)
    patches.quieten()
    on_cpu = arguments.device(["--helix-device", device]) == "cpu"
    if on_cpu:
        from megatron_helix.upstream import cpu_device

        cpu_device.enable()
    patches.read_flag_help_once()
    saved = saved_model.saved_arguments(checkpoint)
    require_served(saved_model.parsed(flags, saved), saved, flags, on_cpu=on_cpu)
    model = saved_model.as_flags(saved_model.of_model(saved))
    own = [
        *("--helix-device", device, "--load", str(checkpoint), "--no-load-optim", "--no-load-rng"),
        "--no-gradient-accumulation-fusion",  # there are none, and it needs apex
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--moe-token-dispatcher-type", "alltoall"),
    ]
    # The layout is checked against the model as if the user had given its flags.
    completed = pretrain_gpt.prepare([*model, *own, *flags], world_size)[len(model) :]
    completed += ["--micro-batch-size", "1"]
    args = saved_model.parsed(completed, saved)
    tokenizer = tokenizer_of(args)
    prompts = request.tokens(tokenizer, args.max_position_embeddings)
    require_split(args, len(prompts) // request.microbatches)
    rows = getattr(saved, "padded_vocab_size", None) or tokenizer.vocab_size
    return Job(
        flags=completed,
        saved=saved,
        request=request,
        prompts=prompts,
        tokenizer=tokenizer,
        vocabulary=min(tokenizer.vocab_size, rows),
    )


def serve(job: Job, sampling: Any, emit: Emit) -> None:
    """Generate on this rank; rank 0 hands each new token to ``emit`` as it comes.

    Args:
        job: from :func:`prepare`.
        sampling: how tokens are drawn, a :class:`megatron_helix.inference.sampling.Sampling`.
        emit: called with (sequence, token) on rank 0.
    """
    import torch

    engine, parts = _start(job, sampling)
    transcript = Transcript(
        [len(prompt) for prompt in job.prompts],
        job.request.new_tokens,
        size=len(job.prompts) // job.request.microbatches,
        end_token=getattr(job.tokenizer, "eod", None),
    )
    for step in chain(engine.prefill(parts), engine.decode(parts, done=transcript.done)):
        for new in transcript.add(step):
            if torch.distributed.get_rank() == 0 and new.token != transcript.end_token:
                emit(new.sequence, new.token)


def measure(job: Job, sampling: Any, folder: Path) -> None:
    """Serve the request on this rank and write what it cost to ``folder``.

    :func:`megatron_helix.inference.measure.read` puts the ranks' files together. Arguments as for
    :func:`serve`; sequences go on to their last token whatever they say.
    """
    import torch

    from megatron_helix.inference.measure import record

    engine, parts = _start(job, sampling)
    del parts
    record(engine, lambda: _parts(job, engine.tp_size), folder, torch.distributed.get_rank())


def _start(job: Job, sampling: Any) -> tuple[Any, Any]:
    import torch

    from megatron_helix.inference.engine import Engine

    model = saved_model.load(job.flags, job.saved)
    device = next(model.parameters()).device
    engine = Engine(model, sampling.sampler(torch.device(device), job.vocabulary))
    return engine, _parts(job, engine.tp_size)


def _parts(job: Job, size: int) -> Any:
    from megatron_helix.inference.engine import micro_batches

    return micro_batches(
        job.prompts, job.request.new_tokens, count=job.request.microbatches, size=size
    )

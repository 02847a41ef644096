"""``helix generate``."""

import contextlib
import multiprocessing as mp
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from megatron_helix.basics import files
from megatron_helix.commands import on_ranks
from megatron_helix.launching import fork_ranks


def generate(
    context: typer.Context,
    load: Annotated[Path, typer.Option(help="Folder that Megatron saved checkpoints in.")],
    nproc_per_node: Annotated[
        int, typer.Option(min=1, help="CPU ranks to start; torchrun's own count under torchrun.")
    ] = 1,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line; \\n is a line break.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the K likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among this much probability; 0 is off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts served together at most.")] = 64,
    microbatches: Annotated[
        int, typer.Option(help="Parts of the batch, for the stages of a pipeline.")
    ] = 1,
    measure: Annotated[
        Path | None, typer.Option(help="Write what it costs to this folder instead of text.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for the ranks' output.")] = None,
) -> None:
    """Generate text from any checkpoint, under any layout.

    On this machine's CPU ranks; or, called by torchrun (`torchrun -m megatron_helix.cli generate`),
    on the GPUs of torchrun's ranks. Flags after -- are the layout: Megatron's parallel sizes, or
    helix's. The model's come from the checkpoint.
    """
    from megatron_helix import generate as generation
    from megatron_helix.inference.requests import Request, read_prompts
    from megatron_helix.inference.sampling import Sampling
    from megatron_helix.options import arguments

    request = Request(
        prompts=read_prompts(prompt or [], prompts),
        new_tokens=tokens,
        max_batch=max_batch,
        microbatches=microbatches,
    )
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if "LOCAL_RANK" in os.environ:
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's own lines
            device = arguments.device(context.args)
            world_size = int(os.environ["WORLD_SIZE"])
            job = generation.prepare(load, request, context.args, world_size, device)
            _require_folder(measure)
            _as_rank(job, sampling, measure, out)
        return
    job = generation.prepare(load, request, context.args, nproc_per_node)
    _require_folder(measure)
    with tempfile.TemporaryDirectory(prefix="helix-generate-") as scratch:
        ranks: dict[str, Any] = {"world_size": nproc_per_node, "logs": logs or Path(scratch)}
        if measure:
            args = (job, sampling, measure)
            on_ranks.run(fork_ranks.Ranks(target=generation.measure, args=args, **ranks))
            _report(measure, sys.stdout)
            return
        here, there = mp.Pipe(duplex=False)
        printer = Printer(job.request.prompts, job.tokenizer, sys.stdout)

        def drain() -> None:
            while here.poll():
                printer.add(*here.recv())

        emit = there.send
        args = (job, sampling, lambda *token: emit(token))
        on_ranks.run(fork_ranks.Ranks(target=generation.serve, args=args, **ranks), poll=drain)
        drain()
        printer.finish()


def _require_folder(measure: Path | None) -> None:
    if measure:
        files.make_writable(measure, "--measure")


def _as_rank(job: Any, sampling: Any, measure: Path | None, out: TextIO) -> None:
    """Do the job on the rank that this process is; rank 0 prints to ``out``."""
    import torch.distributed as dist

    from megatron_helix import generate as generation

    first = os.environ["RANK"] == "0"
    if measure:
        generation.measure(job, sampling, measure)
        dist.barrier()  # every rank's file is there
        if first:
            _report(measure, out)
    elif first:
        printer = Printer(job.request.prompts, job.tokenizer, out)
        generation.serve(job, sampling, printer.add)
        printer.finish()
    else:
        generation.serve(job, sampling, lambda *token: None)
    dist.destroy_process_group()


def _report(folder: Path, out: TextIO) -> None:
    from dataclasses import asdict

    from megatron_helix.inference import measure

    for name, value in asdict(measure.read(folder)).items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        typer.echo(f"{name}: {shown}", file=out)


class Printer:
    """Prints the first sequence as it grows, and the others behind it, in order.

    Args:
        prompts: printed before what belongs to them.
        tokenizer: makes text of token ids.
        out: where to.
    """

    def __init__(self, prompts: tuple[str, ...], tokenizer: Any, out: TextIO):
        self.prompts, self.tokenizer, self.out = prompts, tokenizer, out
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.printed = ""
        self._print(prompts[0])

    def add(self, sequence: int, token: int) -> None:
        """One new token of a sequence."""
        self.tokens[sequence].append(token)
        if sequence == 0:
            # A character may be some tokens: it shows as U+FFFD until the last of them is there.
            text = self.tokenizer.detokenize(self.tokens[0]).rstrip("\ufffd")
            self._print(text[len(self.printed) :])
            self.printed = text

    def finish(self) -> None:
        """Print what is left."""
        texts = [self.tokenizer.detokenize(tokens) for tokens in self.tokens]
        self._print(texts[0][len(self.printed) :] + "\n")
        for prompt, text in zip(self.prompts[1:], texts[1:], strict=True):
            self._print(f"\n{prompt}{text}\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True, file=self.out)

"""``helix generate``."""

import multiprocessing as mp
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_helix import launch


def generate(
    context: typer.Context,
    load: Annotated[Path, typer.Option(help="Folder that Megatron saved checkpoints in.")],
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 1,
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
    """Generate text on this machine's CPU ranks, under any layout, from any checkpoint.

    Flags after -- are the layout: Megatron's parallel sizes, or helix's. The model's come from the
    checkpoint.
    """
    from megatron_helix import generate as generation
    from megatron_helix.inference.requests import Request, read_prompts
    from megatron_helix.inference.sampling import Sampling

    request = Request(
        prompts=read_prompts(prompt or [], prompts),
        new_tokens=tokens,
        max_batch=max_batch,
        microbatches=microbatches,
    )
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    job = generation.prepare(load, request, context.args, nproc_per_node)
    with tempfile.TemporaryDirectory(prefix="helix-generate-") as scratch:
        ranks: dict[str, Any] = {"world_size": nproc_per_node, "logs": logs or Path(scratch)}
        if measure:
            args = (job, sampling, measure)
            _run(launch.Ranks(target=generation.measure, args=args, **ranks))
            _report(measure)
            return
        here, there = mp.Pipe(duplex=False)
        printer = Printer(job.request.prompts, job.tokenizer)

        def drain() -> None:
            while here.poll():
                printer.add(*here.recv())

        emit = there.send
        args = (job, sampling, lambda *token: emit(token))
        _run(launch.Ranks(target=generation.serve, args=args, **ranks), poll=drain)
        drain()
        printer.finish()


def _run(ranks: launch.Ranks, **options: Any) -> None:
    """Run the ranks; when one fails, show the end of its output before it is gone."""
    try:
        launch.run(ranks, **options)
    except launch.RankFailed as failure:
        log = ranks.log(failure.rank)
        if log and log.exists():
            typer.echo("\n".join(log.read_text(errors="replace").splitlines()[-20:]), err=True)
        raise


def _report(folder: Path) -> None:
    from dataclasses import asdict

    from megatron_helix.inference import measure

    for name, value in asdict(measure.read(folder)).items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        typer.echo(f"{name}: {shown}")


class Printer:
    """Prints the first sequence as it grows, and the others behind it, in order.

    Args:
        prompts: printed before what belongs to them.
        tokenizer: makes text of token ids.
    """

    def __init__(self, prompts: tuple[str, ...], tokenizer: Any):
        self.prompts, self.tokenizer = prompts, tokenizer
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.printed = ""
        _print(prompts[0])

    def add(self, sequence: int, token: int) -> None:
        """One new token of a sequence."""
        self.tokens[sequence].append(token)
        if sequence == 0:
            # A character may be some tokens: it shows as U+FFFD until the last of them is there.
            text = self.tokenizer.detokenize(self.tokens[0]).rstrip("\ufffd")
            _print(text[len(self.printed) :])
            self.printed = text

    def finish(self) -> None:
        """Print what is left."""
        texts = [self.tokenizer.detokenize(tokens) for tokens in self.tokens]
        _print(texts[0][len(self.printed) :] + "\n")
        for prompt, text in zip(self.prompts[1:], texts[1:], strict=True):
            _print(f"\n{prompt}{text}\n")


def _print(text: str) -> None:
    print(text, end="", flush=True)

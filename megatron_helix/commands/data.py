"""``helix data``."""

from pathlib import Path
from typing import Annotated

import typer


def data(
    sources: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Prefix of the dataset: OUT.bin and OUT.idx.")],
    pattern: Annotated[str, typer.Option(help="Which files of a folder.")] = "*",
    sft: Annotated[
        bool, typer.Option(help="Files of JSON lines, conversations for --sft: OUT.jsonl.")
    ] = False,
    seq_length: Annotated[int, typer.Option(help="With --sft: tokens of a row.")] = 2048,
) -> None:
    """Make a Megatron dataset of UTF-8 bytes: one document a file, byte 0 ends a document."""
    if sft:
        from megatron_helix import conversations

        found = conversations.build(sources, out, row_tokens=seq_length)
        typer.echo(f"{out}.jsonl: {found}")
        return
    from megatron_helix import corpus

    summary = corpus.build(sources, out, pattern=pattern)
    typer.echo(f"{out}.bin, {out}.idx: {summary.documents:,} documents, {summary.tokens:,} tokens")

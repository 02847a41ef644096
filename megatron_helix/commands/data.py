"""``helix data``."""

from pathlib import Path
from typing import Annotated

import typer


def data(
    sources: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Prefix of the dataset: OUT.bin and OUT.idx.")],
    pattern: Annotated[str, typer.Option(help="Which files of a folder.")] = "*",
) -> None:
    """Make a Megatron dataset of UTF-8 bytes: one document a file, byte 0 ends a document."""
    from megatron_helix import corpus

    summary = corpus.build(sources, out, pattern=pattern)
    typer.echo(f"{out}.bin, {out}.idx: {summary.documents:,} documents, {summary.tokens:,} tokens")

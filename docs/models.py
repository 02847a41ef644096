"""Writes the tables of docs/models.md: ``python docs/models.py``.

A test compares. Which degrees stock takes, Megatron is asked; of helix the planner's own checks
are. What stands outside the marks is written by hand and kept.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_helix.basics.errors import UserError
from megatron_helix.machine import hardware
from megatron_helix.planner import accuracy, parameters
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.memory import cache_bytes_of_token
from megatron_helix.planner.search import Found, search
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.upstream import cpu_device

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
MODELS = [
    read_config(ModelConfig, path)
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml"))
    if "Source:" in path.read_text()
]
DEGREES = range(1, 17)
CHUNK = 16  # tokens of a sequence on a rank: a length that no degree is refused for

MACHINE = hardware.load(ROOT / "configs" / "hardware" / "h100_2x8_ib.yaml").scaled(8)
LENGTH = 2048  # of a sequence, and of the context; the model's own where it has fewer positions
SEQUENCES = {"train": 256, "decode": 64}


def stock_takes(model: ModelConfig, degree: int) -> bool:
    """Whether Megatron makes the model's config at this degree, and can cut its MLP."""
    cpu_device.enable()  # before Megatron is imported
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import divide

    try:
        TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            kv_channels=model.kv_channels,
            tensor_model_parallel_size=degree,
        )
        if not model.num_experts:  # an expert is not cut, unless asked for
            divide(model.ffn_hidden_size, degree)
    except (ValueError, AssertionError):
        return False
    return True


def stock(model: ModelConfig, degree: int) -> Deployment:
    """Stock tensor parallelism on as many ranks, unchecked."""
    return _deployment(model, degree, LayoutConfig(name="stock", tp=degree, micro_batch=1))


def helix(model: ModelConfig, degree: int) -> Deployment | None:
    """The cut of fewest segments into as many tiles; None where there is none."""
    for m in (size for size in range(1, degree + 1) if degree % size == 0):
        layout = LayoutConfig(name="helix", m=m, n=degree // m, micro_batch=m)
        try:
            return _deployment(model, degree, layout).check()
        except UserError:
            continue
    return None


def _deployment(model: ModelConfig, degree: int, layout: LayoutConfig) -> Deployment:
    batch = BatchConfig(sequences=layout.micro_batch, sequence_length=CHUNK * degree)
    return Deployment(model, layout, batch, degree)


def degrees() -> list[str]:
    """Who takes which degree, and how helix cuts what stock refuses or replicates."""
    rows = []
    for model in MODELS:
        cells = []
        for degree in DEGREES:
            cut, words = helix(model, degree), ["s"] if stock_takes(model, degree) else []
            if cut is None:
                words.append("-")
            elif cut.cut.m > 1:
                words.append(f"{cut.cut.m}x{cut.cut.n}")
            cells.append(" ".join(words))
        rows.append([model.name, f"{model.num_attention_heads} / {model.query_groups}", *cells])
    return table(["model", "heads / groups"], map(str, DEGREES), rows)


def cache() -> list[str]:
    """Bytes of a token in the cache of a rank: stock's, and helix's where it is another."""
    rows = []
    for model in MODELS:
        cells = []
        for degree in DEGREES:
            cut = helix(model, degree)
            held = cut and _kilobytes(cut)
            stocks = _kilobytes(stock(model, degree)) if stock_takes(model, degree) else None
            words = [stocks] if stocks == held else [stocks or "-", held or "-"]
            cells.append(" / ".join(word or "-" for word in words))
        rows.append([model.name, *cells])
    return table(["model"], map(str, DEGREES), rows)


def waste() -> list[str]:
    """What padding adds to the weights of attention / of the MLP under helix, in per cent."""
    rows = []
    for model in MODELS:
        cells = []
        for degree in DEGREES:
            cut = helix(model, degree)
            added = (cut.cut.waste, cut.features / model.ffn_hidden_size - 1) if cut else ()
            said = " / ".join(f"{100 * one:.1f}" if one else "0" for one in added)
            cells.append((said if any(added) else "0") if cut else "-")
        rows.append([model.name, *cells])
    return table(["model"], map(str, DEGREES), rows)


def _kilobytes(here: Deployment) -> str:
    return f"{cache_bytes_of_token(here) / 1e3:.3g}"


def plans() -> list[str]:
    """What the planner takes on :data:`MACHINE`, and how far helix's best is from stock's."""
    rows = []
    for model in MODELS:
        one = LayoutConfig(name="one", tp=1, micro_batch=1)
        whole = Deployment(model, one, BatchConfig(sequences=1, sequence_length=1), 1)
        held = sum(parameters.held(whole, 0))
        row = [model.name, f"{held / 1e9:.2f}"]
        for phase, sequences in SEQUENCES.items():
            length = min(LENGTH, model.max_position_embeddings or LENGTH)
            batch = BatchConfig(sequences=sequences, sequence_length=length)
            try:
                row += _taken(search(model, MACHINE, batch, phase=phase))
            except UserError as error:
                needs = re.search(r"needs (\d+ GB)", str(error))
                row += [f"does not fit: {needs[1]}" if needs else "none", "", "", ""]
        rows.append(row)
    heads = [f"{phase}{what}" for phase in ("training: ", "generating: ") for what in _TAKEN]
    return table(["model", "10^9 parameters"], heads, rows)


_TAKEN = ("layout", "TPS", "GB", "helix")


def _taken(found: Found) -> list[str]:
    best = found.ranked[0]
    helix, stocks = (
        next((one for one in found.ranked if one.deployment.layout.is_helix == is_helix), None)
        for is_helix in (True, False)
    )
    apart = "-"
    if helix and stocks:
        apart = f"{helix.tokens_per_s / stocks.tokens_per_s - 1:+.1%}"
        apart += " ~" * accuracy.alike(helix, stocks)
    size = f"{best.memory.total / 1e9:.0f}"
    size += "?" * accuracy.may_not_fit(best, MACHINE.memory.rate)
    return [best.deployment.layout.name, f"{best.tokens_per_s:,.0f}", size, apart]


def departures() -> list[str]:
    """What Megatron's flags cannot say of a model: as it is, and as it is run."""
    rows = [
        [model.name, *(word.strip() for word in said.split(":", 1))]
        for model in MODELS
        for said in model.departures
    ]
    return table(["model", "is", "is run with"], (), rows)


def table(words: list[str], figures: Iterable[str], rows: list[list[str]]) -> list[str]:
    """A table of Markdown, the columns of figures to the right."""
    figures = list(figures)
    rule = ["---"] * len(words) + ["---:"] * len(figures)
    return [*("| " + " | ".join(row) + " |" for row in ([*words, *figures], rule, *rows)), ""]


PARTS: dict[str, Callable[[], list[str]]] = {
    "degrees": degrees,
    "waste": waste,
    "cache": cache,
    "plans": plans,
    "departures": departures,
}


def page(text: str, parts: Iterable[str] = PARTS) -> str:
    """The page with these of its tables made anew."""
    for part in parts:
        begin, end = f"<!-- table: {part} -->", "<!-- table end -->"
        made = "\n".join([begin, "", *PARTS[part](), end])
        text = re.sub(rf"{begin}.*?{end}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

"""The helix flags, as Megatron's parser gets them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange import strategy
from megatron_helix.run_config import core_attention

DEVICES = ("auto", "cpu", "cuda")
PHASES = ("train", "prefill")


class FlagParser(argparse.ArgumentParser):
    """Reads some flags beside which there are others, before Megatron's parser reads all."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        """Refuse a value of the wrong kind in one line, where argparse prints all flags first.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message.removeprefix('argument ')}; correct that flag")


class HelpFormatter(argparse.HelpFormatter):
    """Shows help texts as they are written, where argparse cannot read them.

    Some of Megatron's have per cent signs, which argparse takes for formats.
    """

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def shown(add: Callable[[argparse.ArgumentParser], object]) -> str:
    """What ``--help`` shows of the flags that ``add`` adds to a parser."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, formatter_class=HelpFormatter
    )
    add(parser)
    return parser.format_help().strip()


def add_helix_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the helix flags; an ``extra_args_provider`` of Megatron's parser."""
    group = parser.add_argument_group(title="helix")
    group.add_argument(
        "--helix-m",
        type=int,
        metavar="M",
        help="Segments every head's dimension is cut into. The tensor-parallel size is M * N.",
    )
    group.add_argument(
        "--helix-n",
        type=_count_or_auto,
        metavar="N",
        help="Head groups the attention heads are cut into. With --tensor-model-parallel-size, one"
        " of M and N follows from the other; auto takes as many as there are ranks where the heads"
        " allow it, which is plain tensor parallelism, else the cut that sends least for the run's"
        " micro-batches. auto is what --helix-exchange, --helix-split or --helix-gather mean"
        " without M and N.",
    )
    group.add_argument(
        "--helix-exchange",
        default="auto",
        metavar="NAME",
        help=f"What moves over the M segments of a head: {', '.join(strategy.EXCHANGES)}. auto"
        " takes what is predicted to cost the least time.",
    )
    group.add_argument(
        "--helix-split",
        default="auto",
        metavar="NAME",
        help=f"Which tokens a rank attends for: {', '.join(strategy.SPLITS)}.",
    )
    group.add_argument(
        "--helix-gather",
        default=strategy.GATHERS[0],
        metavar="NAME",
        help=f"How often the exchange weights gathers a weight: {', '.join(strategy.GATHERS)}."
        " once keeps the gathered weights of a step over its micro-batches, 1/N of all weights;"
        " step their gradients as well, which then come home once. A pass without a backward one"
        " gathers in every micro-batch.",
    )
    group.add_argument(
        "--helix-gather-layers",
        type=int,
        metavar="K",
        help="Layers whose weights are kept as --helix-gather once or step says: the first K of"
        " every pipeline stage, or of every model chunk of a virtual one; the others gather in"
        " every micro-batch, and so does multi-token prediction. All of them by default, and"
        " where there are fewer. Each layer less needs less memory and takes more time.",
    )
    group.add_argument(
        "--helix-core-attention",
        metavar="NAME",
        help=f"What computes softmax(QK)V: {', '.join(core_attention.NAMES)}. spec is that of the"
        " layer spec, TransformerEngine's or the local one; "
        + "".join(f"{name} {own.said}; " for name, own in core_attention.OWN.items())
        + "auto takes what was fastest where it was measured. Works without M and N, too. By"
        " default a training with M * N > 1 takes auto on GPUs, but spec with attention dropout,"
        " CUDA graphs or a layer spec of its own; all else takes spec. Megatron's"
        " --attention-backend is of spec alone.",
    )
    group.add_argument(
        "--helix-hardware",
        type=Path,
        metavar="FILE",
        help="The machine, as helix calibrate writes it: what auto compares times by, those of"
        " exchanges and splits and those of core attentions. Without one H100 and H200 are known;"
        " elsewhere the exchange that sends the fewest bytes is taken.",
    )
    group.add_argument(
        "--helix-device",
        default="auto",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}. auto is cuda; cpu runs Megatron on gloo ranks and fills in the"
        " flags a CPU needs.",
    )
    group.add_argument(
        "--helix-initial-weights",
        type=Path,
        metavar="DIR",
        help="Folder of a checkpoint in torch_dist format whose weights the model starts from,"
        " nothing else. They are loaded before data parallelism wraps the model, so that Megatron"
        " FSDP, whose --load reads no such checkpoint, starts from them as well.",
    )
    group.add_argument(
        "--helix-metrics",
        type=Path,
        metavar="DIR",
        help="Write one JSON line a step and rank to DIR: loss, gradient norm, times, traffic.",
    )
    group.add_argument(
        "--helix-phase",
        default=PHASES[0],
        metavar="NAME",
        help=f"What a step is: {', '.join(PHASES)}. prefill is the forward pass alone; needs"
        " --helix-metrics.",
    )
    group.add_argument(
        "--helix-profile",
        action="store_true",
        help="Run the last step under torch's profiler, for --helix-metrics.",
    )
    group.add_argument(
        "--helix-sample-interval",
        type=int,
        metavar="N",
        help="Continue the prompts of --helix-sample-prompts after every N steps, by the likeliest"
        " tokens, and print the text; with --helix-metrics it is kept there, too.",
    )
    group.add_argument(
        "--helix-sample-prompts",
        type=Path,
        metavar="FILE",
        help="Prompts, one a line; \\n is a line break.",
    )
    group.add_argument(
        "--helix-sample-tokens",
        type=int,
        default=32,
        metavar="N",
        help="New tokens for each of the prompts.",
    )
    return parser


def _count_or_auto(word: str) -> int | str:
    return word if word == "auto" else int(word)

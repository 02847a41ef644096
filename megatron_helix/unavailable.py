"""Flags that Megatron-LM's script obeys and ours cannot: what they lack here, said at start.

Our entry point (:mod:`megatron_helix.pretrain_gpt`) stands in for the script, which the wheel does
not have. Some of what the script calls is not in the wheel either, some needs a package that is not
installed, and some a GPU. A checkout's own script, patched, is not asked any of this.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_helix.errors import UserError

_MODELOPT = (
    *("--modelopt-enabled", "--export-model-type", "--export-legacy-megatron"),
    *("--export-te-mcore-model", "--export-default-te-spec", "--export-force-local-attention"),
    *("--export-kv-cache-quant", "--export-real-quant-cfg", "--export-quant-cfg"),
    *("--export-kd-teacher-load", "--export-kd-teacher-model-config", "--export-kd-cfg"),
    *("--export-kd-teacher-ckpt-format", "--export-qk-l2-norm", "--export-offline-model"),
    *("--export-moe-apply-probs-on-input", "--finetune-hf-dataset", "--finetune-data-split"),
    *("--qad-train-target", "--freeze-base-for-mtp", "--enable-gpt-oss"),
)
_PACKED = ("--sft", "--dataloader-inter-document-masking", "--hybrid-context-parallel")
_CHECKOUT = "train with the script of a Megatron-LM checkout (scripts/patch_megatron.sh)"

# Tokenizers that can leave special tokens out of a text, as the dataset for filling in middles
# asks of them.
_OF_PLAIN_TEXT = ("GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer")


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """What flags lack here.

    Attributes:
        flags: of Megatron's; any of them asks for it.
        lacks: what it needs and does not find.
        instead: what to do.
        where: whether that is so for these flags on this machine; always, by default.
    """

    flags: tuple[str, ...]
    lacks: str
    instead: str
    where: Callable[[argparse.Namespace], bool] = lambda flags: True


def _missing(*packages: str) -> Callable[[argparse.Namespace], bool]:
    return lambda flags: not all(map(find_spec, packages))


def _is_local(flags: argparse.Namespace) -> bool:
    return flags.transformer_impl == "local" and not flags.spec


UNAVAILABLE = (
    Unavailable(
        flags=_MODELOPT,
        lacks="needs megatron.post_training, which megatron-core's wheel does not have",
        instead=_CHECKOUT,
    ),
    Unavailable(
        flags=("--perform-rl-step",),
        lacks="needs megatron.rl, which megatron-core's wheel does not have",
        instead=_CHECKOUT,
    ),
    Unavailable(
        flags=("--yaml-cfg",),
        lacks="takes the place of the command line, and knows none of the helix flags",
        instead="give what it holds as flags",
    ),
    Unavailable(
        flags=("--sft",),
        lacks="needs the packages datasets and transformers, which are not installed",
        instead="pip install datasets transformers",
        where=_missing("datasets", "transformers"),
    ),
    Unavailable(
        flags=("--sft",),
        lacks="needs a tokenizer of conversations",
        instead="add --tokenizer-type SFTTokenizer",
        where=lambda flags: flags.tokenizer_type != "SFTTokenizer" and not flags.tokenizer_metadata,
    ),
    Unavailable(
        flags=("--logits-save-dir", "--logits-load-dir"),
        lacks="needs the package zstandard, which is not installed",
        instead="pip install zstandard",
        where=_missing("zstandard"),
    ),
    Unavailable(
        flags=("--inprocess-restart",),
        lacks="needs the package nvidia-resiliency-ext, which is not installed",
        instead="pip install nvidia-resiliency-ext, or leave it away",
        where=_missing("nvidia_resiliency_ext"),
    ),
    Unavailable(
        flags=("--fim-data",),
        lacks="needs a tokenizer that can leave special tokens out of a text",
        instead=f"use --tokenizer-type {' or '.join(_OF_PLAIN_TEXT)}",
        where=lambda flags: (
            flags.tokenizer_type not in (None, *_OF_PLAIN_TEXT) and not flags.tokenizer_metadata
        ),
    ),
    Unavailable(
        flags=_PACKED,
        lacks="packs documents into one row, which Megatron's local attention cannot keep apart",
        instead="use --transformer-impl transformer_engine on a GPU, or a --spec whose core"
        " attention can",
        where=_is_local,
    ),
    Unavailable(
        flags=("--record-memory-history",),
        lacks="records what a GPU's allocator does",
        instead="leave it away on a CPU",
        where=lambda flags: flags.helix_device == "cpu",
    ),
)


def require_available(argv: Sequence[str]) -> None:
    """Refuse flags that lack something here.

    Args:
        argv: flags of Megatron's and helix's, completed.

    Raises:
        UserError: naming the flag, what it lacks and what to do.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("transformer-impl", "tokenizer-type", "tokenizer-metadata", "helix-device"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--spec", nargs="*")
    flags = parser.parse_known_args(argv)[0]
    given = {word.partition("=")[0] for word in argv}
    for row in UNAVAILABLE:
        asked = [flag for flag in row.flags if flag in given]
        if asked and row.where(flags):
            raise UserError(f"{asked[0]}: {row.lacks}; {row.instead}")

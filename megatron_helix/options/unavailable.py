"""Flags that Megatron-LM's script obeys and ours cannot: what they lack here, said at start.

Our entry point (:mod:`megatron_helix.pretrain_gpt`) stands in for the script, which the wheel does
not have. Some of what the script calls is not in the wheel either, some needs a package that is not
installed, and some a GPU. A checkout's own script, patched, is not asked any of this.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.core_attention import OWN

_MODELOPT = (
    *("--modelopt-enabled", "--export-model-type", "--export-legacy-megatron"),
    *("--export-te-mcore-model", "--export-default-te-spec", "--export-force-local-attention"),
    *("--export-kv-cache-quant", "--export-real-quant-cfg", "--export-quant-cfg"),
    *("--export-kd-teacher-load", "--export-kd-teacher-model-config", "--export-kd-cfg"),
    *("--export-kd-teacher-ckpt-format", "--export-qk-l2-norm", "--export-offline-model"),
    *("--export-moe-apply-probs-on-input", "--finetune-hf-dataset", "--finetune-data-split"),
    *("--qad-train-target", "--freeze-base-for-mtp", "--enable-gpt-oss"),
)
BYTES = 256
_PACKED = ("--sft", "--dataloader-inter-document-masking")
_CHECKOUT = "train with the script of a Megatron-LM checkout (scripts/patch_megatron.sh)"

# Tokenizers that can leave special tokens out of a text, as the dataset for filling in middles
# asks of them.
_OF_PLAIN_TEXT = ("GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer")


Where = Callable[[argparse.Namespace], bool]


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
    where: Where = lambda flags: True  # a field's default


def _missing(*packages: str) -> Where:
    return lambda flags: not all(map(find_spec, packages))


def _on_cpu(flags: argparse.Namespace) -> bool:
    return flags.helix_device == "cpu"


def _tokenizes_otherwise(*kinds: str) -> Where:
    """Whether the tokenizer is none of these kinds; metadata may name any other."""
    return lambda flags: (
        bool(flags.tokenizer_type and flags.tokenizer_type not in kinds) and not flags.metadata_path
    )


def _attends_locally(flags: argparse.Namespace) -> bool:
    own = flags.helix_core_attention in OWN
    return own or (flags.transformer_impl == "local" and not flags.spec)


def _has_test_data(flags: argparse.Namespace) -> bool:
    if flags.test_data_path:
        return True
    shares = (flags.split or "969,30,1").split(",")
    return bool(flags.data_path) and len(shares) > 2 and float(shares[2]) > 0


def _validates_by_several(flags: argparse.Namespace) -> bool:
    sequences = flags.eval_micro_batch_size or flags.micro_batch_size or 1
    return flags.pipeline_model_parallel_size > 1 and sequences > 1


def _packs_several(flags: argparse.Namespace) -> bool:
    trained = flags.pipeline_model_parallel_size > 1 and (flags.micro_batch_size or 1) > 1
    return trained or _validates_by_several(flags)


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
        lacks="needs the package transformers for --tokenizer-type SFTTokenizer, and does not find"
        " it",
        instead="pip install transformers, or use --tokenizer-type NullTokenizer for bytes",
        where=lambda flags: (
            flags.tokenizer_type == "SFTTokenizer" and _missing("transformers")(flags)
        ),
    ),
    Unavailable(
        flags=("--logits-save-dir", "--logits-load-dir"),
        lacks="needs the package zstandard, and does not find it",
        instead="pip install zstandard",
        where=_missing("zstandard"),
    ),
    Unavailable(
        flags=("--inprocess-restart",),
        lacks="needs the package nvidia-resiliency-ext, and does not find it",
        instead="pip install nvidia-resiliency-ext, or leave it away",
        where=_missing("nvidia_resiliency_ext"),
    ),
    Unavailable(
        flags=("--sft",),
        lacks="needs a tokenizer of conversations",
        instead="use --tokenizer-type SFTTokenizer, or NullTokenizer for bytes",
        where=_tokenizes_otherwise("SFTTokenizer", "NullTokenizer"),
    ),
    Unavailable(
        flags=("--sft",),
        lacks="reads conversations as bytes, which are of 256 tokens",
        instead="use --vocab-size 256, or --tokenizer-type SFTTokenizer",
        where=lambda flags: (
            flags.tokenizer_type == "NullTokenizer" and (flags.vocab_size or 0) < BYTES
        ),
    ),
    Unavailable(
        flags=("--sft",),
        lacks="packs rows without masks, and counts positions by document",
        instead="leave --reset-position-ids, --reset-attention-mask and --mock-data away",
        where=lambda flags: (
            flags.reset_position_ids or flags.reset_attention_mask or flags.mock_data
        ),
    ),
    Unavailable(
        flags=("--fim-data",),
        lacks="needs a tokenizer that can leave special tokens out of a text",
        instead=f"use --tokenizer-type {' or '.join(_OF_PLAIN_TEXT)}",
        where=_tokenizes_otherwise(*_OF_PLAIN_TEXT),
    ),
    Unavailable(
        flags=_PACKED,
        lacks="tells where documents end, which Megatron's plan of a forward pass leaves out",
        instead="leave --overlap-moe-expert-parallel-comm away",
        where=lambda flags: flags.overlap_moe_expert_parallel_comm,
    ),
    Unavailable(
        flags=("--hybrid-context-parallel",),
        lacks="cuts documents over ranks, which neither Megatron's local attention nor"
        " any --helix-core-attention can",
        instead="use --transformer-impl transformer_engine on a GPU, or a --spec whose core"
        " attention can",
        where=_attends_locally,
    ),
    Unavailable(
        flags=_PACKED,
        lacks="packs a micro-batch into one row, and pipeline stages send rows of --seq-length",
        instead="use --micro-batch-size 1, for evaluation as well",
        where=_packs_several,
    ),
    Unavailable(
        flags=("--full-validation",),
        lacks="counts a list of validation sets in Megatron's loop, and fails with one alone",
        instead="add --multiple-validation-sets, which takes one as well",
        where=lambda flags: not flags.multiple_validation_sets,
    ),
    Unavailable(
        flags=("--multiple-validation-sets",),
        lacks="is for validation in full only, in Megatron's loop",
        instead="add --full-validation",
        where=lambda flags: not flags.full_validation,
    ),
    Unavailable(
        flags=("--full-validation",),
        lacks="counts test data as a list, too, in Megatron's loop, and fails when all is trained",
        instead="give no test data: no --test-data-path, or --split with 0 for it",
        where=_has_test_data,
    ),
    Unavailable(
        flags=("--full-validation",),
        lacks="reads sequences one by one, and pipeline stages send what validation's micro-batch"
        " size says",
        instead="use --eval-micro-batch-size 1",
        where=_validates_by_several,
    ),
    Unavailable(
        flags=("--record-memory-history", "--log-straggler"),
        lacks="asks a GPU what it does",
        instead="leave it away on a CPU",
        where=_on_cpu,
    ),
    Unavailable(
        flags=("--use-persistent-ckpt-worker", "--logits-save-dir"),
        lacks="saves from a process of its own, which looks for a GPU",
        instead="leave it away on a CPU",
        where=_on_cpu,
    ),
)


def require_available(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse flags that lack something here.

    Args:
        args: what Megatron's parser makes of ``argv``.
        argv: flags of Megatron's and helix's, completed.

    Raises:
        UserError: naming the flag, what it lacks and what to do.
    """
    given = {word.partition("=")[0] for word in argv}
    for row in UNAVAILABLE:
        asked = [flag for flag in row.flags if flag in given]
        if asked and row.where(args):
            raise UserError(f"{asked[0]}: {row.lacks}; {row.instead}")

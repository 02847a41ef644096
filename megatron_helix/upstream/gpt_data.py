"""The data of a GPT run: Megatron's datasets for the three splits, built where they are read.

Beside :mod:`megatron_helix.upstream.gpt_training` the other half of Megatron-LM's
``pretrain_gpt.py``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_helix.upstream.conversation_data import ByteConversations, ConversationDataset


def train_valid_test_datasets(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """The datasets of training, validation and test, ``None`` on ranks that read no data."""
    args = get_args()

    def built_on_this_rank(vp_stage: int | None = vp_stage) -> bool:
        if parallel_state.get_tensor_model_parallel_rank():
            return False
        return packs_documents(args) or stage_embeds_or_predicts(vp_stage)

    return BlendedMegatronDatasetBuilder(
        _dataset(args), num_samples, built_on_this_rank, _config(args)
    ).build()


# Every rank builds its own part: megatron.training reads this attribute of the provider.
setattr(train_valid_test_datasets, "is_distributed", True)  # noqa: B010  # not a known attribute


def packs_documents(args: argparse.Namespace) -> bool:
    """Whether a row is several documents apart: every pipeline stage is to know where they end."""
    return args.sft or args.dataloader_inter_document_masking


def stage_embeds_or_predicts(vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs tokens or labels."""
    return is_first_or_last_pipeline_stage(vp_stage) or stage_has_mtp(vp_stage)


def stage_has_mtp(vp_stage: int | None) -> bool:
    """Whether this pipeline stage has layers of multi-token prediction."""
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _dataset(args: argparse.Namespace) -> type:
    if args.sft:
        return ConversationDataset
    if args.mock_data:
        return MockGPTDataset
    return GPTFIMDataset if args.fim_data else GPTDataset


def _config(args: argparse.Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = args.per_dataset_sequences_path
    settings: dict[str, Any] = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": _tokenizer(args),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequences_per_dataset": json.loads(Path(counts).read_text()) if counts else None,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "hybrid_context_parallel": args.hybrid_context_parallel,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    return (
        GPTFIMDatasetConfig(**settings, **_fim(args))
        if args.fim_data
        else GPTDatasetConfig(**settings)
    )


def _tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's; of conversations in bytes ours, where Megatron's takes numbers for words."""
    if args.sft and args.tokenizer_type == "NullTokenizer":
        return ByteConversations()
    return build_tokenizer(args)


def _fim(args: argparse.Namespace) -> dict[str, Any]:
    """How documents are turned to fill in their middle."""
    names = ("rate", "spm_rate", "split_sample", "fragment_rate", "no_prefix")
    tokens = ("prefix", "middle", "suffix", "pad", "eod")
    return {
        **{f"fim_{name}": getattr(args, f"fim_{name}") for name in names},
        "fim_extra_tokens": {name: getattr(args, f"fim_{name}_token") for name in tokens},
    }

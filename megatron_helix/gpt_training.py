"""What Megatron's loop asks of a GPT entry point: the data, the forward step and the loss.

``megatron.training.pretrain`` is the loop; the wheel ships it without the ``pretrain_gpt.py`` that
a Megatron-LM checkout has at its root, so these few functions stand in for it. They hold no helix
code: a baseline runs through the very same functions.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: GPTModel) -> Any:
    """One micro-batch through ``model``: its output, and the function that makes it a loss."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, position_ids, attention_mask, labels, loss_mask = _micro_batch(data_iterator, vp_stage)
    timer.stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(_loss, loss_mask)


def _loss(
    loss_mask: Any, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed token loss, the number of tokens it sums over, and the pair as the loop reports it."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def _micro_batch(data_iterator: Any, vp_stage: int | None) -> list[torch.Tensor | None]:
    """The tensors of :data:`BATCH_KEYS`; ``None`` on pipeline stages that need no data."""
    args = get_args()
    if not _stage_needs_data(vp_stage):
        return [None] * len(BATCH_KEYS)
    batch: dict[str, torch.Tensor | None] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: _to_device(sample.get(key)) for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_stage_has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    return [batch.get(key) for key in BATCH_KEYS]


def _to_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cuda(non_blocking=True)


def _stage_has_mtp(vp_stage: int | None) -> bool:
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _stage_needs_data(vp_stage: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or _stage_has_mtp(vp_stage)


def train_valid_test_datasets(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Megatron's GPTDataset (or its mock) for the three splits, built where the data is read."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset

    def built_on_this_rank(vp_stage: int | None = vp_stage) -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and _stage_needs_data(vp_stage)

    return BlendedMegatronDatasetBuilder(dataset, num_samples, built_on_this_rank, config).build()


# Every rank builds its own part: megatron.training reads this attribute of the provider.
setattr(train_valid_test_datasets, "is_distributed", True)  # noqa: B010  # not a known attribute

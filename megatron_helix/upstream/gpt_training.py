"""What Megatron's loop asks of a GPT entry point: the forward step, the loss, who embeds.

``megatron.training.pretrain`` is the loop; the wheel ships it without the ``pretrain_gpt.py`` that
a Megatron-LM checkout has at its root, so this module and :mod:`megatron_helix.upstream.gpt_data`
stand in for it (read at core_v0.19.0). They obey every flag that it obeys, but those that
:mod:`megatron_helix.options.unavailable` refuses, and hold no helix code: a baseline runs through
the very same functions.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from megatron_helix.upstream.gpt_data import (
    packs_documents,
    stage_embeds_or_predicts,
    stage_has_mtp,
)

Batch = dict[str, Any]

# What a sample may bring. The last five are of packed documents and of hybrid context parallelism.
BATCH_KEYS = (
    *("tokens", "position_ids", "attention_mask", "labels", "loss_mask"),
    *("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group"),
)
SPIKE = 10  # a loss of so many times the largest one seen is spiky, as in Megatron-LM's script


def forward_step(
    data_iterator: Iterator[Batch], model: GPTModel, return_schedule_plan: bool = False
) -> Any:
    """One micro-batch through ``model``: its output, and the function that makes it a loss.

    With ``return_schedule_plan`` (``--overlap-moe-expert-parallel-comm``) the forward pass is not
    run but planned, and the plan is what comes instead of the output.
    """
    timer, stragglers = get_timers()("batch-generator", log_level=2), StragglerDetector()
    timer.start()
    with stragglers(bdata=True):
        batch = _micro_batch(data_iterator, model)
        packed = _packed(batch)
    timer.stop()
    inputs = [batch[key] for key in ("tokens", "position_ids", "attention_mask")]
    scored = {key: batch[key] for key in ("labels", "loss_mask")}
    with stragglers:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **scored)
        else:
            output = model(*inputs, **scored, packed_seq_params=packed)
    return output, partial(loss_func, batch["loss_mask"], model=model)


def embedding_ranks(pipeline: list[int]) -> list[int]:
    """The ranks of a pipeline that hold the word embeddings.

    The first; the last, whose LM head shares them, unless it has weights of its own; and those of
    multi-token prediction, which embeds the tokens once more.
    """
    ranks = {pipeline[0]}
    if len(pipeline) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline[-1])
        ranks.update(get_mtp_ranks(pipeline, core_transformer_config_from_args(args)))
    return sorted(ranks)


def loss_func(
    loss_mask: Any, output: torch.Tensor, model: GPTModel
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed token loss, the number of tokens it sums over, and the pair as the loop reports it."""
    args = get_args()
    if args.logits_load_dir is not None:
        distilled = _distillation(
            args.logits_load_dir,
            decode_threads=args.logits_load_decode_threads,
            prefetch_factor=args.logits_load_prefetch_factor,
            msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
            kd_loss_alpha=args.logits_load_kd_loss_alpha,
            ignore_errors=args.logits_load_ignore_errors,
        )
        loss, num_tokens, report = distilled(loss_mask, output, model=model)
    else:
        mask = loss_mask.view(-1).float()
        loss = torch.sum(output.view(-1).float() * mask)
        num_tokens = mask.sum().detach().to(torch.int)
        report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    _validate(loss)
    return loss, num_tokens, report


@cache
def _distillation(folder: str, **settings: Any) -> Any:
    """The loss against a teacher's saved logits; one for the run, for it reads them in order."""
    from megatron.training.distillation import LossFuncCallable

    return LossFuncCallable(logprobs_dir=folder, **settings)


def _validate(loss: torch.Tensor) -> None:
    """Hand the loss to Megatron's rerun machine, which asks whether it can be right."""
    args, machine = get_args(), get_rerun_state_machine()
    found: list[tuple[Any, str, bool]] = []  # what to reject, its message, whether it is fatal
    if args.check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            found.append((reject, f"found {name} in local forward loss calculation", True))
    if args.check_for_spiky_loss:
        large = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        found.append((large, "Spiky loss", False))
    for reject, message, fatal in found:
        machine.validate_result(
            result=loss, rejection_func=reject, message=message, tolerance=0.0, fatal=fatal
        )


def _micro_batch(data_iterator: Any, model: GPTModel) -> Batch:
    """The tensors of :data:`BATCH_KEYS`; ``None`` for those that this pipeline stage lacks."""
    args = get_args()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    embeds_or_predicts = stage_embeds_or_predicts(vp_stage)
    if not (embeds_or_predicts or packs_documents(args)):
        return dict.fromkeys(BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: _to_device(sample.get(key)) for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=packs_documents(args),
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=_sequences(batch, model),
        seq_length=args.seq_length,
        mtp_on_this_rank=stage_has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if embeds_or_predicts:  # the stages between have no tokens, only where documents end
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=args.hybrid_context_parallel,
            cp_group=parallel_state.get_context_parallel_group(),
            hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
            use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
        )
    return {key: batch.get(key) for key in BATCH_KEYS}


def _to_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cuda(non_blocking=True)


def _sequences(batch: Batch, model: GPTModel) -> int:
    """Sequences of a micro-batch that the first tensor-parallel rank has read, for the others.

    A validation micro-batch may be of another size than a training one, and of another than a
    test one (full validation reads sequences one by one): there the first rank says.
    """
    args = get_args()
    always = args.eval_micro_batch_size == args.micro_batch_size and not args.full_validation
    if model.training or always:
        return args.micro_batch_size
    size = torch.tensor(len(batch["tokens"]) if batch else 0, device=torch.cuda.current_device())
    torch.distributed.broadcast(
        size,
        parallel_state.get_tensor_model_parallel_src_rank(),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return int(size)


def _packed(batch: Batch) -> PackedSeqParams | None:
    """Where the documents of a packed row begin and end; ``None`` for rows that are not packed."""
    if batch["cu_seqlens"] is None:
        return None
    args = get_args()
    ends, padded = (
        None if batch[key] is None else batch[key].squeeze(0)  # [1, documents + 1], as a batch
        for key in ("cu_seqlens", "cu_seqlens_padded")
    )
    update_seqlen_stats_from_cu_seqlens(ends)  # FLOPs are counted of tokens that are no padding
    used = ends if padded is None else padded
    longest = int(batch["max_seqlen"])
    local = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=used,
        cu_seqlens_kv=used,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if local is None else int(local),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=args.seq_length,
    )

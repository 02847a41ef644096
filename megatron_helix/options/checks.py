"""Checks of flags that parse: each raises the one error that the user must read.

``args`` are the helix flags and those of Megatron's that :mod:`megatron_helix.options.arguments`
reads.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange import strategy, traffic
from megatron_helix.exchange.plan import Plan
from megatron_helix.partition.layout import HelixLayout


def require_one_of(flag: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that a flag has one of the values it knows."""
    if value not in allowed:
        raise UserError(f"{flag}: must be one of {', '.join(allowed)}, got {value!r}")


def require_plan(args: argparse.Namespace, asked: strategy.Choice, cut: HelixLayout) -> None:
    """Check that the micro-batches of the run can be exchanged and split as ``asked``."""
    if asked.exchange == "scores" and not cut.pairs_are_whole:
        raise UserError(
            "--helix-exchange: scores needs both channels of a rotary pair in one segment, got"
            f" --kv-channels {cut.kv_channels}, {cut.rotary_dim} of them rotary, --helix-m {cut.m};"
            " use another --helix-m or --rotary-percent, or --helix-exchange activations"
        )
    if asked.gather == "step" and args.overlap_grad_reduce:
        raise UserError(
            "--helix-gather: step brings gradients home at the end of a step, and"
            " --overlap-grad-reduce sends them before; leave one of the two away"
        )
    if cut.m > 1 and args.seq_length and args.micro_batch_size:
        _plan(args, asked, cut, args.micro_batch_size)
        for flag, batch, remedy in _validated(args, cut):
            try:
                _plan(args, asked, cut, batch)
            except ValueError as error:
                cause = str(error).partition(";")[0]
                raise UserError(
                    f"{flag}: validation reads micro-batches of {batch}, which no rank can take a"
                    f" part of: {cause}; {remedy}"
                ) from None


def require_shares(args: argparse.Namespace, size: int) -> None:
    """Check what ``size`` tensor-parallel ranks share and nothing pads; says what they could share.

    Heads are the layout's to judge, and the features of MLPs are padded.
    """
    stream = size * args.context_parallel_size
    counts = [
        ("--padded-vocab-size", args.padded_vocab_size, "--helix-m x --helix-n", size),
        (
            *("--num-experts", args.num_experts),
            *("--expert-model-parallel-size", args.expert_model_parallel_size),
        ),
    ]
    if args.mtp_num_layers:  # whose projection of embedding and stream is cut along the stream
        of = "--helix-m x --helix-n, beside --mtp-num-layers,"
        counts.append(("--hidden-size", args.hidden_size, of, size))
    # Of packed rows the ranks share all of a micro-batch: the plan's to judge.
    packs = args.sft or args.dataloader_inter_document_masking
    if args.sequence_parallel and args.micro_batch_size and not packs:
        of = "--helix-m x --helix-n" + " x --context-parallel-size" * (stream > size)
        counts.append(("--seq-length", args.seq_length, of, stream))
    for flag, count, of, parts in counts:
        if count and count % parts:
            raise UserError(
                f"{flag}: must be a multiple of {of} ({parts}), got {count};"
                f" use {strategy.multiples(count, parts)}"
            )


def _shape(args: argparse.Namespace) -> traffic.BlockShape:
    return traffic.BlockShape(
        hidden=args.hidden_size,
        ffn=0 if args.num_experts else args.ffn_hidden_size or 4 * args.hidden_size,
        gated=args.swiglu or args.quick_geglu,
        num_layers=args.num_layers,
    )


def _plan(args: argparse.Namespace, asked: strategy.Choice, cut: HelixLayout, batch: int) -> Plan:
    """The plan for micro-batches of ``batch`` sequences."""
    known = asked, cut, _shape(args)
    parallel = {"sequence_parallel": args.sequence_parallel}
    if args.sft or args.dataloader_inter_document_masking:
        return strategy.packed_plan(*known, tokens=batch * args.seq_length, **parallel)
    sequence = args.seq_length // args.context_parallel_size
    return strategy.resolve(*known, sequence=sequence, batch=batch, **parallel)


def least_sending(
    args: argparse.Namespace, asked: strategy.Choice, cuts: Sequence[HelixLayout]
) -> HelixLayout:
    """Of cuts that begin with that of fewest segments, the one that sends least in the run.

    Without a dim axis, that first one is plain tensor parallelism and is taken as it is; so is it
    where the micro-batches are not known: of the cuts that exchange tokens it sends least.
    """
    if cuts[0].m == 1 or not (args.seq_length and args.micro_batch_size):
        return cuts[0]

    def sent(cut: HelixLayout) -> float:
        try:
            plan = _plan(args, asked, cut, args.micro_batch_size)
        except UserError:  # which is raised again if no cut can run
            return math.inf
        sequence = args.seq_length // args.context_parallel_size
        size = {"sequence": sequence, "batch": args.micro_batch_size}
        of_step = {"microbatches": asked.microbatches, "training": asked.training}
        return traffic.per_layer(plan, cut, _shape(args), **size, **of_step)

    return min(cuts, key=sent)


def _validated(args: argparse.Namespace, cut: HelixLayout) -> Iterator[tuple[str, int, str]]:
    """Micro-batches of validation: the flag they come from, their size, and what else to give."""
    if args.eval_micro_batch_size:
        of = f"--helix-m ({cut.m})"
        if args.sft or args.dataloader_inter_document_masking:  # all of them are one row
            of = str(cut.size // math.gcd(cut.size, args.seq_length))
        yield "--eval-micro-batch-size", args.eval_micro_batch_size, f"use a multiple of {of}"
    if args.full_validation:
        yield "--full-validation", 1, "leave it away, or use another --seq-length"


def require_rival(args: argparse.Namespace, on_cpu: bool) -> None:
    """Check a stock way to share out weights or a sequence, where Megatron fails late or unclearly.

    Beside Megatron's own validation, which a rank does before there is a process group.
    """
    shards = args.tensor_parallel_num_weight_shards or 1
    is_gtp = shards > args.tensor_model_parallel_size
    if is_gtp and (args.add_qkv_bias or not args.disable_bias_linear):
        biased = "--add-qkv-bias" if args.add_qkv_bias else "no --disable-bias-linear"
        raise UserError(
            "--tensor-parallel-num-weight-shards: GTP gives a bias of QKV a gradient of the wrong"
            f" shape (megatron-core 0.19), got {shards} and {biased}; leave GTP or the bias away"
        )
    if not on_cpu:
        return
    if is_gtp:
        raise UserError(
            "--tensor-parallel-num-weight-shards: GTP needs TransformerEngine and a GPU, got"
            f" {shards} and --helix-device cpu; leave it away, or use --use-torch-fsdp2, which runs"
            " on CPUs"
        )
    if args.context_parallel_size > 1 and not args.spec:
        raise UserError(
            "--context-parallel-size: needs TransformerEngine's attention and a GPU, got"
            f" {args.context_parallel_size} and --helix-device cpu; use 1, or give a --spec whose"
            " core attention runs on CPUs"
        )


def require_norms(args: argparse.Namespace, on_cpu: bool) -> None:
    """Check that the norms of the run can have weights around zero."""
    if on_cpu and args.apply_layernorm_1p:
        raise UserError(
            "--apply-layernorm-1p: needs TransformerEngine's norms, which do not run on a CPU, got"
            " --helix-device cpu; leave it away: weights are then stored with 1 added"
        )


def require_data(args: argparse.Namespace) -> None:
    """Check that what the data flags name is there."""
    words = [
        word
        for paths in (
            args.data_path,
            args.train_data_path,
            args.valid_data_path,
            args.test_data_path,
        )
        for word in paths or ()
    ]
    for word in words:
        if _is_number(word) or "://" in word:  # a blend's weight, another machine's
            continue
        if args.sft:
            if not Path(word).exists():
                raise UserError(
                    f"--data-path: {word} must be a file of conversations under --sft, one a line"
                    " as JSON, and does not exist; give one"
                )
            continue
        for suffix in (".bin", ".idx"):
            if not Path(word + suffix).exists():
                raise UserError(
                    f"--data-path: {word} must be the prefix of a Megatron dataset, and"
                    f" {word}{suffix} does not exist; make one with"
                    f" `helix data FILES --out {word}`"
                )


def require_loadable(args: argparse.Namespace, *, where: str = "under --helix-m > 1") -> None:
    """Check that what a run loads is described by canonical rows, which any layout can read.

    Checkpoints of Megatron's that are not hold memory as it lay on a rank: under another layout
    they would load without a word, in a wrong order.

    Args:
        args: of the run.
        where: that holds.
    """
    loaded = [
        ("--load", args.load, args.ckpt_step),
        ("--pretrained-checkpoint", args.pretrained_checkpoint, args.ckpt_step),
    ]
    if args.non_persistent_ckpt_type:
        folder = args.non_persistent_global_ckpt_dir
        folder = folder or (args.load and Path(args.load, "non_persistent"))
        loaded.append(("--non-persistent-ckpt-type", folder, None))
    for flag, folder, step in loaded:
        checkpoint = folder and newest_checkpoint(Path(folder), step)
        if not checkpoint or not checkpoint.is_dir():
            continue  # nothing to load: Megatron's to judge
        if not (checkpoint / "metadata.json").exists():
            raise UserError(
                f"{flag}: a checkpoint {where} must be in torch_dist format, and"
                f" {checkpoint} is not; load it with the stock layout that saved it, and save it"
                " with --ckpt-format torch_dist"
            )
        if args.use_distributed_optimizer and not (args.no_load_optim or args.finetune):
            _require_canonical_optimizer(flag, checkpoint, where)


def newest_checkpoint(folder: Path, step: int | None) -> Path | None:
    """The checkpoint in ``folder`` that Megatron would load, if it says so."""
    if step:
        return folder / f"iter_{step:07d}"
    tracker = folder / "latest_checkpointed_iteration.txt"
    last = tracker.read_text().strip() if tracker.exists() else ""
    return folder / (f"iter_{int(last):07d}" if last.isdigit() else last) if last else None


def _require_canonical_optimizer(flag: str, checkpoint: Path, where: str) -> None:
    from megatron.core.dist_checkpointing import load_content_metadata
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    found = (load_content_metadata(str(checkpoint)) or {}).get("distrib_optim_sharding_type")
    if found and found not in DistributedOptimizer.checkpoint_fully_reshardable_formats:
        raise UserError(
            f"{flag}: the optimizer state must be fully_reshardable {where}, and in"
            f" {checkpoint} it is {found}, in the order of a rank's memory; save with"
            " --dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

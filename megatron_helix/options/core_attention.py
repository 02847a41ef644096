"""``--helix-core-attention``: what each of them cannot do, and which one ``auto`` takes.

A run that does not say takes ``auto`` under a partition, else the layer spec's; and where ``auto``
would take what nobody ran or timed beside the run's other flags, the layer spec's as well.
"""

import argparse
import importlib.util
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels import core_times
from megatron_helix.machine import hardware
from megatron_helix.options.checks import require_one_of
from megatron_helix.options.features.check import require_compatible
from megatron_helix.run_config.core_attention import NAMES, OWN, Own


def require_core_attention(args: argparse.Namespace, on_cpu: bool) -> None:
    """Check that the core attention that is asked for can do what the run asks of it.

    Args:
        args: the helix flags and Megatron's, parsed.
        on_cpu: whether ranks are on the CPU device.

    Raises:
        UserError: for the first thing that it cannot.
    """
    core = args.helix_core_attention
    if core is None:
        return
    require_one_of("--helix-core-attention", core, NAMES)
    _require(core, args, on_cpu)


def chosen(
    args: argparse.Namespace, model_config: Any, *, on_cpu: bool, training: bool
) -> tuple[str, str]:
    """The core attention of a run, not ``auto``, and a line for the log if there is one to say.

    Args:
        args: the helix flags and Megatron's, parsed and completed.
        model_config: the ``GPTModelConfig`` made from them.
        on_cpu: whether ranks are on the CPU device.
        training: whether there are backward passes.

    Raises:
        UserError: when the file of times cannot be read.
    """
    asked = args.helix_core_attention
    if asked not in (None, "auto"):
        return asked, ""
    cut = (args.helix_m or 1) * (args.helix_n or 1) > 1
    if asked is None and (on_cpu or not cut or not training):
        return "spec", ""
    path = args.helix_hardware
    times = (hardware.load(path).core_attention if path else ()) or core_times.MEASURED
    timed_here = times is not core_times.MEASURED
    able = [core for core in OWN if _can(core, args, on_cpu)]
    channels = _channels(args)
    best, why = "spec", "the run is on the CPU, and the times are a GPU's"
    if not on_cpu or timed_here:
        best, why = core_times.fastest(
            times, able, channels=channels, length=args.seq_length, training=training
        )
    if asked is None and best == "spec":
        return "spec", ""
    if asked is None and (reason := _keeps_spec(args, model_config, timed_here)):
        return "spec", (
            f"helix core attention spec: {reason}; --helix-core-attention auto takes {best}"
        )
    return best, f"helix core attention {best}, of spec, {', '.join(able) or 'no other'}: {why}"


def _keeps_spec(args: argparse.Namespace, model_config: Any, timed_here: bool) -> str:
    """Why a run that does not say keeps the layer spec's; empty where it need not."""
    import torch

    transformer = model_config.transformer
    if args.attention_dropout:
        return "no other was timed with --attention-dropout, and they draw other masks"
    if transformer.cuda_graph_impl != "none":
        return f"no other has been captured by --cuda-graph-impl {transformer.cuda_graph_impl}"
    if model_config.transformer_layer_spec is not None:
        return "a layer spec of your own is left its core attention"
    if not timed_here and torch.cuda.get_device_capability() != (9, 0):
        return "the times are of a Hopper GPU, and this is none; helix calibrate measures them"
    try:  # with one segment nothing else has asked it
        require_compatible(args, model_config, transformer)
    except UserError as error:
        return f"no other has been run beside {str(error).partition(':')[0]}"
    return ""


def able(channels: int, *, on_cpu: bool) -> list[str]:
    """Which can run a plain causal attention of this head dimension on this machine."""
    plain = argparse.Namespace(
        attention_dropout=0.0,
        bf16=True,
        context_parallel_size=1,
        dataloader_inter_document_masking=False,
        fp16=False,
        helix_exchange="auto",
        kv_channels=channels,
        multi_latent_attention=False,
        reset_attention_mask=False,
        sft=False,
        softmax_type="vanilla",
        window_size=None,
    )
    return [core for core in OWN if _can(core, plain, on_cpu)]


def _channels(args: argparse.Namespace) -> int:
    """Head dimension, of flags that Megatron has validated or not."""
    if args.kv_channels:
        return args.kv_channels
    return (args.hidden_size or 0) // (args.num_attention_heads or 1)


def _can(core: str, args: argparse.Namespace, on_cpu: bool) -> bool:
    try:
        _require(core, args, on_cpu)
    except UserError:
        return False
    return True


def _require(core: str, args: argparse.Namespace, on_cpu: bool) -> None:
    if core not in OWN:
        return
    own = OWN[core]
    if args.attention_dropout and not own.dropout:
        raise UserError(
            f"--helix-core-attention: {core} needs --attention-dropout 0, since its kernel has no"
            f" dropout, got {args.attention_dropout}; set it to 0"
        )
    if args.helix_exchange == "scores":
        raise UserError(
            f"--helix-core-attention: {core} never has the scores that --helix-exchange scores"
            " moves, got both; use --helix-exchange activations or weights"
        )
    if args.context_parallel_size > 1:
        raise UserError(
            f"--helix-core-attention: {core} attends within one rank and needs"
            f" --context-parallel-size 1, got {args.context_parallel_size}; leave one of the two"
            " away"
        )
    if args.multi_latent_attention:
        raise UserError(
            f"--helix-core-attention: {core} takes the place of Megatron's SelfAttention's, and"
            " --multi-latent-attention has none; leave one of the two away"
        )
    for flag in ("--sft", "--dataloader-inter-document-masking"):
        if getattr(args, flag[2:].replace("-", "_")):
            raise UserError(
                f"--helix-core-attention: {core} keeps no documents apart that {flag} packs into"
                " a row, got both; leave one of the two away"
            )
    if on_cpu and not own.on_cpu:
        raise UserError(
            f"--helix-core-attention: {core} needs a GPU, since its kernels have no backward pass"
            " on a CPU, got --helix-device cpu; leave one of the two away"
        )
    if own.plain:
        _require_plain(core, args)
    _require_channels(core, own, _channels(args))
    if own.half:
        _require_half(core, args)
    if core == "ffpa":
        _require_ffpa()


def _require_plain(core: str, args: argparse.Namespace) -> None:
    """Causal attention alone."""
    for flag, given, default in (
        ("--window-size", args.window_size, None),
        ("--softmax-type", args.softmax_type, "vanilla"),
        ("--reset-attention-mask", args.reset_attention_mask, False),
    ):
        if given != default:
            raise UserError(
                f"--helix-core-attention: {core} has no kernel for windows, softmax offsets and"
                f" masks of documents, got {flag} {given}; use --helix-core-attention prefix"
            )


def _require_channels(core: str, own: Own, channels: int) -> None:
    if channels and own.channels is not None and channels not in own.channels:
        raise UserError(
            f"--helix-core-attention: {core} has kernels for {own.channels_said} channels a"
            f" head, got {channels}; use --helix-core-attention auto"
        )


def _require_half(core: str, args: argparse.Namespace) -> None:
    if not (args.bf16 or args.fp16):
        raise UserError(
            f"--helix-core-attention: {core} has kernels for half precision, got neither --bf16 nor"
            " --fp16; add one"
        )


def _require_ffpa() -> None:
    """Where the kernels of ffpa-attn 0.2.4 for Hopper can run."""
    if importlib.util.find_spec("ffpa_attn") is None:
        raise UserError(
            "--helix-core-attention: ffpa needs the package ffpa-attn, which is not installed; pip"
            " install 'megatron-helix[ffpa]'"
        )
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        raise UserError(
            "--helix-core-attention: ffpa has its kernels for Hopper (compute capability 9.0), and"
            f" this GPU has {major}.{minor}; use --helix-core-attention prefix"
        )

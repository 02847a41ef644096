"""What the helix flags imply for Megatron's flags, and every refusal of a bad combination.

Before torch or Megatron are imported, as far as that can be, :func:`complete` takes the user's
flags and returns them with what follows from them appended: it reads no more of Megatron's than a
layout needs. It raises the one error the user must read, before any process group exists; so does
:mod:`megatron_helix.options.parsed`, which asks Megatron's own parser.
"""

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange import strategy
from megatron_helix.machine.hardware import Hardware
from megatron_helix.options import checks
from megatron_helix.options.checks import (
    require_loadable,
    require_norms,
    require_one_of,
    require_plan,
    require_rival,
    require_shares,
)
from megatron_helix.options.core_attention import require_core_attention
from megatron_helix.options.features.check import needs_order
from megatron_helix.options.features.works import IN_ORDER
from megatron_helix.options.flags import (
    DEVICES,
    PHASES,
    FlagParser,
    add_helix_arguments,
)
from megatron_helix.partition.layout import HelixLayout, require_divides
from megatron_helix.run_config.core_attention import OWN
from megatron_helix.run_config.model import rotated_channels

# Flags that are about a partition: to give one of them is to ask for it.
_ASKING = ("--helix-m", "--helix-n", "--helix-exchange", "--helix-split", "--helix-gather")

# Flags of Megatron's that a layout is checked against.
_SIZES = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"),
    *("kv-channels", "num-experts", "seq-length", "micro-batch-size", "global-batch-size"),
    *("eval-micro-batch-size", "tensor-parallel-num-weight-shards", "padded-vocab-size"),
    "mtp-num-layers",
)
_SWITCHES = (
    *("group-query-attention", "rotary-interleaved", "attention-output-gate", "swiglu"),
    *("sequence-parallel", "overlap-grad-reduce", "multi-latent-attention"),
    *("use-distributed-optimizer", "no-load-optim", "finetune", "full-validation"),
    *("sft", "dataloader-inter-document-masking", "reset-attention-mask", "bf16", "fp16"),
    *("use-megatron-fsdp", "use-torch-fsdp2", "add-qkv-bias", "disable-bias-linear"),
    *("apply-layernorm-1p", "quick-geglu"),
)
_NEVER = str(10**9)  # steps
_FOLDERS = ("load", "non-persistent-global-ckpt-dir", "pretrained-checkpoint")

# What a CPU needs of Megatron. Each line is appended unless the user said something about its flag.
_CPU_FLAGS = (
    ("--transformer-impl", "local"),
    ("--distributed-backend", "gloo"),
    ("--use-cpu-initialization",),
    ("--no-persist-layer-norm",),
    ("--no-gradient-accumulation-fusion",),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-rope-fusion",),
)
# And for Megatron FSDP: gloo does not multiply as it sums, by which NCCL averages gradients.
_CPU_FSDP_FLAGS = (("--no-gradient-reduce-div-fusion",),)


def wants_helix(args: argparse.Namespace) -> bool:
    """Whether completed flags have an m x n partition; without one the run is stock Megatron."""
    return args.helix_m is not None or args.helix_n is not None


def want_helix(argv: Sequence[str]) -> bool:
    """:func:`wants_helix` of flags that Megatron has not parsed yet."""
    return wants_helix(_read(argv))


def device(argv: Sequence[str]) -> str:
    """The device the flags name, ``"cpu"`` or ``"cuda"``.

    Raises:
        UserError: for an unknown device, and where there is no GPU and the CPU was not asked for.
    """
    name = _read(argv).helix_device
    require_one_of("--helix-device", name, DEVICES)
    if name == "cpu":
        return "cpu"
    import torch

    from megatron_helix.upstream import cpu_device

    if cpu_device.is_enabled() or not torch.cuda.is_available():
        raise UserError(
            "--helix-device: needs a GPU that torch can see, and found none; add --helix-device cpu"
            " to run Megatron's loop on the CPU"
        )
    return "cuda"


def complete(argv: Sequence[str], world_size: int) -> list[str]:
    """``argv`` with the Megatron flags that follow from it appended.

    Args:
        argv: the user's flags, without the program name.
        world_size: ranks of the run.

    Raises:
        UserError: for a combination that cannot run; names field, requirement, value and remedy.
            Flags that are not helix's and not about a layout are Megatron's to judge.
    """
    args = _read(argv)
    strategy.require_known(choice(args))
    require_one_of("--helix-phase", args.helix_phase, PHASES)
    if args.helix_phase != PHASES[0] and not args.helix_metrics:
        raise UserError(
            f"--helix-phase: {args.helix_phase} needs --helix-metrics DIR, where its measurements"
            " go, got none; give a folder, or leave --helix-phase away to train"
        )
    implied = []
    if any(_given(flag, argv) for flag in _ASKING):
        degree = _complete_degree(args, argv)
        implied = [*degree, *_helix_flags(args, argv, world_size)]
    on_cpu = device(argv) == "cpu"
    require_core_attention(args, on_cpu)
    require_norms(args, on_cpu)
    if not wants_helix(args) or args.helix_m == 1:  # else the table of features refuses them
        require_rival(args, on_cpu)
    own = [
        *(_cpu_flags(args, argv) if on_cpu else ()),
        *_logger_flags(argv),
        *_mask_flags(args, argv),
    ]
    return [*argv, *own, *_eval_flags(argv), *implied]


def _read(argv: Sequence[str]) -> argparse.Namespace:
    """The helix flags and those of Megatron's that they are checked against, with its defaults.

    Not with Megatron's parser: importing that takes seconds of CPU for every rank, and a bad layout
    is to be refused before any of it.
    """
    parser = add_helix_arguments(FlagParser())
    for name in ("tensor-model", "pipeline-model", "context", "expert-model"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=int)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("data-path", "train-data-path", "valid-data-path", "test-data-path"):
        parser.add_argument(f"--{name}", nargs="*")
    for name in _FOLDERS:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--non-persistent-ckpt-type")
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--rotary-percent", type=float, default=1.0)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--window-size")
    parser.add_argument("--softmax-type", default="vanilla")
    for row in IN_ORDER:
        parser.add_argument(row.asks, nargs="+")
    return parser.parse_known_args(argv)[0]


def require_data(argv: Sequence[str]) -> None:
    """Fail on a missing dataset now, once, instead of on one rank after minutes of set-up.

    Raises:
        UserError: naming the file.
    """
    checks.require_data(_read(argv))


def choice(args: argparse.Namespace, machine: Hardware | None = None) -> strategy.Choice:
    """The exchange, split and gathering the flags ask for, compared on ``machine``."""
    sequences = (args.micro_batch_size or 1) * (getattr(args, "data_parallel_size", None) or 1)
    return strategy.Choice(
        exchange=args.helix_exchange,
        split=args.helix_split,
        gather=args.helix_gather,
        gather_layers=args.helix_gather_layers,
        chunks=args.pipeline_model_parallel_size
        * (getattr(args, "virtual_pipeline_model_parallel_size", None) or 1),
        microbatches=max(1, (args.global_batch_size or sequences) // sequences),
        keeps_sequences=args.context_parallel_size > 1,
        keeps_order=needs_order(args),
        training=args.helix_phase == PHASES[0],
        core_attention=args.helix_core_attention or "spec",
        machine=machine,
    )


def layout(
    args: argparse.Namespace,
    *,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
) -> HelixLayout:
    """The partition the flags name, for a model's head counts."""
    rotary = args.position_embedding_type, args.rotary_percent
    return HelixLayout(
        m=args.helix_m,
        n=args.helix_n,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        rotary_dim=rotated_channels(*rotary, kv_channels),
        rotary_interleaved=args.rotary_interleaved,
        output_gate=args.attention_output_gate,
    )


def _cpu_flags(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    sharded = _CPU_FSDP_FLAGS if args.use_megatron_fsdp else ()
    return [word for flag in (*_CPU_FLAGS, *sharded) if not _given(flag[0], argv) for word in flag]


def _logger_flags(argv: Sequence[str]) -> list[str]:
    """No tracking with a package of NVIDIA's own that is not there: the last rank would say so."""
    asked = any(word.startswith(("--one-logger", "--no-one-logger")) for word in argv)
    return [] if asked or find_spec("one_logger") else ["--no-one-logger"]


def _mask_flags(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """No mask where it would be read in vain, or never be made.

    Our own core attentions hide what is ahead by position, but ``--reset-attention-mask`` says
    more; and Megatron's dataset of conversations asserts that it is to make none.
    """
    flag = "--no-create-attention-mask-in-dataloader"
    own = args.helix_core_attention in OWN
    needless = args.sft or (own and not args.reset_attention_mask)
    return [flag] if needless and not _given(flag, argv) else []


def _eval_flags(argv: Sequence[str]) -> list[str]:
    """Never, in a number: Megatron (0.19) means never where none is given, and divides by it."""
    return [] if _given("--eval-interval", argv) else ["--eval-interval", _NEVER]


def _given(flag: str, argv: Sequence[str]) -> bool:
    """Whether the user set a flag, as one word or as two."""
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def _complete_degree(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Fill in which of m, n is left open, from the tensor-parallel size; the flags that say so."""
    given = [name for name in ("helix_m", "helix_n") if isinstance(getattr(args, name), int)]
    size = args.tensor_model_parallel_size
    if len(given) == 2:
        return []
    if not _given("--tensor-model-parallel-size", argv):
        missing = "--helix-n" if given == ["helix_m"] else "--helix-m"
        raise UserError(
            f"{missing}: must be given, or --tensor-model-parallel-size that it follows from, got"
            " neither; the tensor-parallel size is --helix-m x --helix-n"
        )
    if given:
        flag, count = f"--{given[0].replace('_', '-')}", getattr(args, given[0])
        require_divides(flag, count, "--tensor-model-parallel-size", size)
        other = "helix_n" if given == ["helix_m"] else "helix_m"
        setattr(args, other, size // count)
    else:
        cut = _auto(args, size)
        args.helix_m, args.helix_n = cut.m, cut.n
    return ["--helix-m", str(args.helix_m), "--helix-n", str(args.helix_n)]


def _auto(args: argparse.Namespace, size: int) -> HelixLayout:
    """The cut of ``size`` ranks that ``auto`` takes, of all that the heads allow."""
    heads, groups, channels = _head_counts(args)
    most = math.gcd(size, heads, groups)
    cuts = []
    for n in (n for n in range(most, 0, -1) if most % n == 0):
        asked = argparse.Namespace(**{**vars(args), "helix_m": size // n, "helix_n": n})
        try:
            cut = layout(
                asked, num_attention_heads=heads, num_query_groups=groups, kv_channels=channels
            )
        except UserError:
            if not cuts:  # of fewest segments: there are too many in the others, too
                raise
            break
        cuts.append(cut)
    return checks.least_sending(args, choice(args), cuts)


def _head_counts(args: argparse.Namespace) -> tuple[int, int, int]:
    """(query heads, query groups, head dimension) of the model that the flags describe."""
    heads = args.num_attention_heads
    if not heads or not (args.kv_channels or args.hidden_size):
        raise UserError(
            "--helix-n: auto needs the model's --num-attention-heads and --hidden-size, got none;"
            " give them, or --helix-m and --helix-n"
        )
    groups = args.num_query_groups if args.group_query_attention else heads
    return heads, groups, args.kv_channels or args.hidden_size // heads


def _helix_flags(args: argparse.Namespace, argv: Sequence[str], world_size: int) -> list[str]:
    """Check the helix flags against the run and return the tensor-parallel size they imply."""
    for name in ("helix_m", "helix_n"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value < 1:
            raise UserError(f"{flag}: must be a positive integer, got {value}")
    size = args.helix_m * args.helix_n
    if _given("--tensor-model-parallel-size", argv) and args.tensor_model_parallel_size != size:
        raise UserError(
            f"--tensor-model-parallel-size: must be --helix-m x --helix-n = {args.helix_m} x"
            f" {args.helix_n} = {size}, got {args.tensor_model_parallel_size}; leave it away"
        )
    model_size = size * args.pipeline_model_parallel_size * args.context_parallel_size
    require_divides(
        "--helix-m x --helix-n (x pipeline x context parallel size)",
        model_size,
        "the number of ranks",
        world_size,
        remedy="change --helix-m or --helix-n, or start another number of ranks",
    )
    if args.num_attention_heads:  # else they come with --use-checkpoint-args
        heads, groups, channels = _head_counts(args)
        cut = layout(
            args,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=channels,
        )
        require_plan(args, choice(args), cut)
    require_shares(args, size)
    if args.helix_m > 1:
        require_loadable(args)
    return ["--tensor-model-parallel-size", str(size)]

"""A case: one model on one layout with some of Megatron's features, as a line of text and as flags.

The line names what differs from the smallest case, then the features' flags as they are::

    layers=2 heads=6 m=3 n=2 sp exchange=weights; --swiglu; --window-size (8,0)

It says everything, so that a case means the same whatever becomes of the table of features.
"""

import shlex
from dataclasses import dataclass, fields
from typing import Any

from megatron_helix.basics.errors import UserError

STEPS = 2  # the second one sees what the first made of weights, norms and optimizer
SAVED_STEP = 1

# Weights large enough that attention is far from uniform: else a wrong rotation or a wrong window
# would hardly move a loss. So is the learning rate, for what starts at zero or one.
_TRAINING = (
    *("--helix-device", "cpu", "--init-method-std", "0.2", "--lr", "1e-2"),
    *(
        "--adam-eps",
        "1e-3",
        "--train-iters",
        str(STEPS),
        "--lr-decay-style",
        "constant",
        "--log-interval",
        "100",
    ),
    *("--eval-iters", "0", "--eval-interval", "1000", "--split", "100,0,0", "--num-workers", "0"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", "0"),
    *("--make-vocab-size-divisible-by", "1"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The defaults are the smallest case, which a failure shrinks to.

    Attributes:
        layers: of the decoder.
        hidden: width of the stream.
        heads: query heads.
        groups: query groups; 0 for as many as heads.
        channels: of a head.
        ffn: features of the MLP, or of an expert.
        vocab: tokens.
        seq: tokens of a sequence.
        micro: sequences of a micro-batch.
        batches: micro-batches of a step, on each data-parallel rank.
        positions: Megatron's ``--position-embedding-type``.
        gated: an MLP with SwiGLU.
        biasless: linears without biases.
        untied: an LM head of its own.
        experts: of every layer; 0 for a dense model.
        topk: experts of a token; 0 for all of them.
        dispatcher: Megatron's ``--moe-token-dispatcher-type``.
        ep: expert parallelism.
        etp: expert tensor parallelism.
        m: segments of a head.
        n: head groups.
        pp: pipeline stages.
        dp: data parallelism.
        sp: sequence parallelism.
        exchange: ``--helix-exchange``.
        split: ``--helix-split``.
        gather: ``--helix-gather``.
        gather_layers: ``--helix-gather-layers`` where weights are kept; 0 for all of them.
        deep: who goes on from a checkpoint after the first step: ``stock`` or ``turned`` (n x m)
            from helix's, ``helix`` from stock's. Empty: no checkpoints.
        features: flags that turn features of Megatron's on, one string a feature. They replace the
            case's own.
    """

    layers: int = 1
    hidden: int = 32
    heads: int = 4
    groups: int = 0
    channels: int = 8
    ffn: int = 64
    vocab: int = 128
    seq: int = 16
    micro: int = 2
    batches: int = 1
    positions: str = "rope"
    gated: bool = False
    biasless: bool = False
    untied: bool = False
    experts: int = 0
    topk: int = 0
    dispatcher: str = "alltoall"
    ep: int = 1
    etp: int = 1
    m: int = 2
    n: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    exchange: str = "auto"
    split: str = "auto"
    gather: str = "microbatch"
    gather_layers: int = 0
    deep: str = ""
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = []
        for field in SIZES:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return "; ".join([" ".join(words), *self.features])

    @property
    def tp(self) -> int:
        """Helix's tensor-parallel size."""
        return self.m * self.n

    @property
    def stock_tp(self) -> int:
        """The largest tensor-parallel size that stock takes, of those that divide helix's."""
        groups = self.groups or self.heads
        return next(
            size
            for size in range(self.tp, 0, -1)
            if self.tp % size == 0
            and self.heads % size == self.ffn % size == 0
            and (groups % size == 0 or size % groups == 0)
        )

    def ranks(self, tp: int) -> int:
        """Of a run with this tensor-parallel size: batches are dealt out alike."""
        return tp * self.pp * self.dp

    @property
    def tags(self) -> frozenset[str]:
        """What it has, in the words of :attr:`megatron_helix.options.features.rows.Works.needs`."""
        has = {
            "dense": not self.experts,
            "moe": bool(self.experts),
            "gqa": bool(self.groups),
            "sp": self.sp,
            "no sp": not self.sp,
            "pp": self.pp > 1,
            "same size": self.tp == self.stock_tp,
            "stock tp": self.stock_tp > 1,
            "even stream": self.hidden % self.tp == 0,
            "filled": self.pp > 1 and self.batches % self.pp == 0,
            "dp": self.dp > 1,
            "ep": self.ep > 1,
            "bias": not self.biasless,
            "biasless": self.biasless,
            "tied": not self.untied,
            "untied": self.untied,
            "packs": self._packs,
            self.positions: True,
        }
        return frozenset(tag for tag, there in has.items() if there)

    @property
    def _packs(self) -> bool:
        """Whether the micro-batch can be a row of documents, which the ranks share."""
        one_row = self.exchange != "scores" and self.split != "batch"
        # Pipeline stages send rows of a sequence's length.
        return (
            one_row and self.micro * self.seq % self.tp == 0 and (self.pp == 1 or self.micro == 1)
        )

    @property
    def turns(self) -> bool:
        """Whether rounding can turn a token: to another expert, or in or out of a full one."""
        found = given(self.stock())
        topk, experts = found.get("--moe-router-topk"), found.get("--num-experts")
        return topk != experts or "--moe-expert-capacity-factor" in found

    def stock(self, tp: int | None = None) -> list[str]:
        """Flags of the run that is the reference.

        Args:
            tp: another tensor-parallel size than :attr:`stock_tp`.
        """
        tp = tp or self.stock_tp
        # Experts' first weights depend on their number on a rank, not on how those are cut.
        cuts = tp * self.dp % (self.ep * self.etp) == 0 and self.ffn % self.etp == 0
        etp = self.etp if cuts else 1
        return self._flags(tp, etp, "--tensor-model-parallel-size", str(tp))

    def helix(self) -> list[str]:
        """Flags of the run that is tried."""
        own = {"exchange": self.exchange, "split": self.split, "gather": self.gather}
        defaults = {field.name: field.default for field in SIZES}
        words = ["--helix-m", str(self.m), "--helix-n", str(self.n)]
        for name, value in own.items():
            if value != defaults[name]:
                words += [f"--helix-{name}", value]
        if self.gather_layers and self.gather != "microbatch":
            words += ["--helix-gather-layers", str(self.gather_layers)]
        return self._flags(self.tp, self.etp, *words)

    def _flags(self, tp: int, etp: int, *layout: str) -> list[str]:
        own = merged([*_TRAINING, *self._model(), *self._parallel(tp, etp)], *self.features)
        return [*own, *layout]

    def _model(self) -> list[str]:
        sizes = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "num-attention-heads": self.heads,
            "kv-channels": self.channels,
            "ffn-hidden-size": self.ffn,
            # It is padded for a tensor-parallel size: to the same one for both.
            "vocab-size": self.vocab + (-self.vocab % self.tp if self.stock_tp != self.tp else 0),
            "seq-length": self.seq,
            "max-position-embeddings": self.seq,
            "micro-batch-size": self.micro,
            "global-batch-size": self.micro * self.batches * self.dp,
            "position-embedding-type": self.positions,
        }
        words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        if self.groups:
            words += ["--group-query-attention", "--num-query-groups", str(self.groups)]
        words += ["--swiglu"] * self.gated
        words += ["--disable-bias-linear"] * self.biasless
        words += ["--untie-embeddings-and-output-weights"] * self.untied
        if self.experts:
            words += ["--num-experts", str(self.experts)]
            words += ["--moe-router-topk", str(self.topk or self.experts)]
            words += ["--moe-token-dispatcher-type", self.dispatcher]
            words += ["--moe-router-load-balancing-type", "none"]
        return words

    def _parallel(self, tp: int, etp: int) -> list[str]:
        words = ["--sequence-parallel"] * (self.sp and tp > 1)
        if self.pp > 1:
            words += ["--pipeline-model-parallel-size", str(self.pp)]
        if self.experts:
            words += ["--expert-model-parallel-size", str(self.ep)]
            words += ["--expert-tensor-parallel-size", str(etp)]
        return words


SIZES = tuple(field for field in fields(Case) if field.name != "features")
_KINDS: dict[str, Any] = {field.name: type(field.default) for field in SIZES}


def parse(line: str) -> Case:
    """The case that a line of text says.

    Raises:
        UserError: for a word that is no field's, or a value of the wrong kind.
    """
    first, *features = (part.strip() for part in line.split(";"))
    values: dict[str, Any] = {}
    for word in first.split():
        name, assigned, value = word.partition("=")
        kind = _KINDS.get(name)
        if kind is None or (kind is bool) == bool(assigned) or (kind is int and not _count(value)):
            raise UserError(
                f"--case: must be fields and values as helix fuzz prints them, got {word!r}; the"
                f" fields are {', '.join(_KINDS)}, and features' flags come after a semicolon"
            )
        values[name] = True if kind is bool else kind(value)
    return Case(**values, features=tuple(feature for feature in features if feature))


def _count(value: str) -> bool:
    return value.isdecimal()


def given(argv: list[str]) -> dict[str, list[str]]:
    """Every flag with its values."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return found


def merged(argv: list[str], *more: str) -> list[str]:
    """Flags, with those of ``more`` instead where they are given twice."""
    found = given(argv)
    for words in more:
        found.update(given(shlex.split(words)))
    return [word for flag, values in found.items() for word in (flag, *values)]

"""A model, a layout and a batch, as configs name them: what planner and experiments share.

Configs come in families that vary on their own. Unknown keys are refused.
"""

import math
from pathlib import Path
from statistics import NormalDist, StatisticsError
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from megatron_helix.basics.errors import UserError

CoreAttention = Literal["spec", "prefix", "flex", "ffpa", "auto"]


Precision = Literal["fp32", "fp16", "bf16"]
ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}  # weights, activations


class Config(BaseModel):
    """A mapping of a config file; frozen, and without keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Config):
    """A GPT model in Megatron's terms: but for three, the keys are the names of its flags.

    Attributes:
        name: of the model.
        add_bias_linear: whether linears have biases; Megatron's flag is ``--disable-bias-linear``.
        vocab_size: what the planner counts with; experiments tokenise bytes, 256 of them.
        max_position_embeddings: the longest sequence; None leaves it to the run.
        departures: what Megatron's flags have no word for, and what stands in its place.
    """

    name: str
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    kv_channels: PositiveInt
    ffn_hidden_size: PositiveInt
    num_experts: PositiveInt | None = None
    moe_router_topk: PositiveInt = 2
    swiglu: bool = False
    quick_geglu: bool = False
    glu_linear_offset: float | None = None
    activation_func_clamp_value: PositiveFloat | None = None
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    norm_epsilon: PositiveFloat | None = None
    apply_layernorm_1p: bool = False
    qk_layernorm: bool = False
    position_embedding_type: Literal["rope", "yarn", "learned_absolute", "none"] = "rope"
    rotary_base: PositiveInt | None = None
    rotary_percent: float | None = Field(default=None, gt=0, le=1)
    rotary_interleaved: bool = False
    rotary_seq_len_interpolation_factor: PositiveInt | None = None
    use_rope_scaling: bool = False
    rope_scaling_factor: PositiveFloat | None = None
    rotary_scaling_factor: PositiveFloat | None = None
    yarn_original_max_position_embeddings: PositiveInt | None = None
    no_yarn_correction_range_round_to_int: bool = False
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: PositiveInt | None = None
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] | None = None
    untie_embeddings_and_output_weights: bool = False
    vocab_size: PositiveInt = 256
    max_position_embeddings: PositiveInt | None = None
    departures: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_gate(self) -> "ModelConfig":
        if self.swiglu and self.quick_geglu:
            raise UserError("quick_geglu: must be false beside swiglu, got true; leave one out")
        return self

    @property
    def query_groups(self) -> int:
        """Key/value groups K; as many as heads without GQA."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, a third weight."""
        return self.swiglu or self.quick_geglu

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated, as Megatron rounds them."""
        is_rotary = self.position_embedding_type in ("rope", "yarn")
        return int(self.kv_channels * (self.rotary_percent or 1)) if is_rotary else 0

    def flags(self) -> list[str]:
        """Megatron's flags for the model. Dropout is off."""
        words = _valued(attention_dropout=0, hidden_dropout=0)
        if not self.add_bias_linear:
            words.append("--disable-bias-linear")
        if self.num_query_groups:
            words.append("--group-query-attention")
        if self.num_experts:
            words += _valued(
                moe_router_topk=self.moe_router_topk,
                moe_router_load_balancing_type="none",
                moe_token_dispatcher_type="alltoall",
            )
        for name in type(self).model_fields:
            value = None if name in _NO_FLAGS else getattr(self, name)
            words += _switch(name) if value is True else _valued(**{name: value})
        return words


# Said in another way above, by the experiment, or to a reader.
_NO_FLAGS = {"name", "moe_router_topk", "add_bias_linear", "vocab_size", "departures"}


class LayoutConfig(Config):
    """How the ranks share the work: stock (``tp``) or helix (``m``, ``n``), with PP and EP beside.

    The data-parallel size is what is left of the ranks. What a layout needs beside its flags is in
    :mod:`megatron_helix.options.environment`.

    Attributes:
        core_attention: another than the layer spec's, in a stock layout too.
        fsdp: fully sharded data parallelism, Megatron's own (strategy ``optim_grads_params``) or
            torch's: a data-parallel rank keeps its part of weights, gradients and optimizer states,
            and gathers a layer's weights for use.
        gtp: of these ranks each keeps 1/gtp of every weight and gathers it for use (Megatron's
            generalized tensor parallelism, ``--tensor-parallel-num-weight-shards``, over tp).
        cp_comm_type: how context-parallel ranks come by keys and values: p2p passes them round a
            ring, a2a trades tokens for heads, all_gather gathers them. Without it TransformerEngine
            takes p2p.
        overlap_dp: whether data parallelism sends gradients, and weights where the optimizer is
            distributed, beside the passes; Megatron FSDP always does.
    """

    name: str
    tp: PositiveInt | None = None
    m: PositiveInt | None = None
    n: PositiveInt | None = None
    exchange: str | None = None
    split: str | None = None
    gather: str | None = None
    core_attention: CoreAttention | None = None
    distributed_optimizer: bool = False
    overlap_dp: bool = False
    fsdp: Literal["megatron_fsdp", "torch_fsdp2"] | None = None
    pp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    cp: PositiveInt = 1
    cp_comm_type: Literal["p2p", "a2a", "all_gather"] | None = None
    gtp: PositiveInt = 1
    micro_batch: PositiveInt

    @model_validator(mode="after")
    def _stock_or_helix(self) -> "LayoutConfig":
        if (self.tp is None) == (self.m is None) or (self.m is None) != (self.n is None):
            raise UserError("needs either tp (a stock layout) or both m and n (a helix layout)")
        if self.tp is not None:
            for key in ("exchange", "split", "gather"):
                if (value := getattr(self, key)) is not None:
                    raise UserError(
                        f"{key}: must be left out of a stock layout (tp), got {value}; say m and n"
                        " instead of tp for a helix layout"
                    )
        if self.cp_comm_type and self.cp == 1:
            raise UserError(
                f"cp_comm_type: needs context parallelism, cp > 1, got {self.cp_comm_type} and cp"
                " 1; give cp, or leave it out"
            )
        self._require_one_way_to_share_weights()
        return self

    def _require_one_way_to_share_weights(self) -> None:
        """Of helix, FSDP and GTP at most one, and FSDP without what Megatron refuses beside it."""
        if self.is_helix and (self.fsdp or self.gtp > 1):
            raise UserError(
                "fsdp, gtp: share out the weights that m and n share already; leave them out of a"
                " helix layout"
            )
        if self.fsdp is None:
            return
        if self.gtp > 1:
            raise UserError(f"gtp: must be 1 with fsdp, got {self.gtp}; leave one of the two away")
        for key in ("distributed_optimizer", "overlap_dp"):
            if getattr(self, key):
                raise UserError(f"{key}: fsdp does so by itself, got both; leave {key} away")
        for key in ("pp", "ep") if self.fsdp == "torch_fsdp2" else ():
            if (value := getattr(self, key)) > 1:
                raise UserError(
                    f"{key}: must be 1 with fsdp: torch_fsdp2, which Megatron runs without it, got"
                    f" {value}; use 1, or megatron_fsdp"
                )

    def require_model(self, model: ModelConfig, precision: str) -> None:
        """Refuse a model or a precision that Megatron does not train in this layout.

        Raises:
            UserError: naming the key, what was required and what was given.
        """
        if self.gtp > 1 and (model.add_qkv_bias or model.add_bias_linear):
            raise UserError(
                f"gtp: must be 1 for a model whose QKV has a bias, got {self.gtp}: Megatron (0.19)"
                " gives that a gradient of the wrong shape; leave gtp away"
            )
        if self.fsdp != "torch_fsdp2":
            return
        if not model.untie_embeddings_and_output_weights:
            raise UserError(
                "fsdp: torch_fsdp2 needs untie_embeddings_and_output_weights: true in the model,"
                " since it shards embedding and LM head apart, got false; use megatron_fsdp, or"
                " untie them"
            )
        if model.num_experts and self.etp != self.tp:
            raise UserError(
                f"etp: must be tp ({self.tp}) with fsdp: torch_fsdp2, since Megatron (0.19) shards"
                f" experts over the same ranks, got {self.etp}; set etp to {self.tp}"
            )
        if not self.trains_in(precision):
            raise UserError(
                f"fsdp: torch_fsdp2 trains in fp32 or bf16 in Megatron, got {precision}; use one of"
                " these, or megatron_fsdp"
            )

    def trains_in(self, precision: str) -> bool:
        """Whether Megatron trains this layout in a precision: its torch FSDP2 scales no loss."""
        return self.fsdp != "torch_fsdp2" or precision != "fp16"

    @property
    def is_helix(self) -> bool:
        """Whether attention is cut m x n."""
        return self.m is not None

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share a layer: tp, or m * n."""
        return self.tp or (self.m or 1) * (self.n or 1)

    def flags(self, model: ModelConfig) -> list[str]:
        """Megatron's and helix's flags for the layout of ``model``."""
        words = _valued(pipeline_model_parallel_size=self.pp, micro_batch_size=self.micro_batch)
        if self.is_helix:
            words += _valued(helix_m=self.m, helix_n=self.n)
            words += _valued(
                helix_exchange=self.exchange, helix_split=self.split, helix_gather=self.gather
            )
        else:
            words += _valued(tensor_model_parallel_size=self.tp)
        words += _valued(helix_core_attention=self.core_attention)
        if self.tensor_parallel_size > 1:
            words.append("--sequence-parallel")
        if self.cp > 1:
            words += _valued(context_parallel_size=self.cp, cp_comm_type=self.cp_comm_type)
        if self.gtp > 1:
            shards = self.tensor_parallel_size * self.gtp
            words += _valued(tensor_parallel_num_weight_shards=shards)
        if self.distributed_optimizer:
            words.append("--use-distributed-optimizer")
        if self.overlap_dp:
            words.append("--overlap-grad-reduce")
            words += ["--overlap-param-gather"] * self.distributed_optimizer
        if self.fsdp:
            words += _FSDP_FLAGS[self.fsdp]
        if model.num_experts:
            words += _valued(
                expert_model_parallel_size=self.ep, expert_tensor_parallel_size=self.etp
            )
        return words


# Each saves in a format of its own; what Megatron's own shards and overlaps must be said.
_FSDP_FLAGS = {
    "megatron_fsdp": (
        *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
        *("--ckpt-format", "fsdp_dtensor", "--use-distributed-optimizer"),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "torch_fsdp2": ("--use-torch-fsdp2", "--ckpt-format", "torch_dist"),
}


class BatchConfig(Config):
    """Tokens of one step.

    Attributes:
        documents: lengths of those that are packed into the sequences, as many times over as it
            takes, cut at the sequence's length; in a file also as :func:`document_lengths` has
            them. None: a sequence is one document.
    """

    sequences: PositiveInt
    sequence_length: PositiveInt
    documents: tuple[PositiveInt, ...] | None = None

    @field_validator("documents", mode="before")
    @classmethod
    def _read_documents(cls, given: Any) -> Any:
        return document_lengths(given) if isinstance(given, str) else given

    @property
    def keys(self) -> float:
        """Tokens of the document that a token is in, ``sum l^2 / sum l``: the mean over tokens."""
        lengths = [min(length, self.sequence_length) for length in self.documents or ()]
        if not lengths:
            return self.sequence_length
        return sum(length**2 for length in lengths) / sum(lengths)

    @property
    def tokens(self) -> int:
        """Tokens of a global batch."""
        return self.sequences * self.sequence_length


def document_lengths(given: str) -> tuple[int, ...]:
    """Lengths of documents, from a file of numbers or from a distribution.

    Args:
        given: the path of a file, or ``lognormal:MEDIAN:SIGMA``, of which 1000 quantiles are
            taken (the logarithm is normal, SIGMA its standard deviation).

    Raises:
        UserError: for a file that cannot be read, and for what are no lengths.
    """
    name, *numbers = given.split(":")
    try:
        if name == "lognormal" and len(numbers) == 2:
            median, sigma = map(float, numbers)
            normal = NormalDist(math.log(median), sigma)
            quantiles = (normal.inv_cdf((i + 0.5) / 1000) for i in range(1000))
            return tuple(max(1, round(math.exp(quantile))) for quantile in quantiles)
        lengths = tuple(map(int, Path(given).read_text().split()))
    except OSError as error:
        raise UserError(
            f"documents: must be a file of lengths or lognormal:MEDIAN:SIGMA, got {given}, which"
            f" cannot be read: {error.strerror}; check the path"
        ) from None
    except (ValueError, StatisticsError, OverflowError) as error:
        raise UserError(
            f"documents: must be lengths in tokens, or lognormal:MEDIAN:SIGMA, got {given}"
            f" ({error}); correct it"
        ) from None
    if not lengths or min(lengths) < 1:
        raise UserError(f"documents: must be lengths of a token or more, got {given}; correct it")
    return lengths


def read_config[T: Config](kind: type[T], path: Path) -> T:
    """The config of one ``kind`` in the file.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    return validated(kind, read_mapping(path), path)


def validated[T: Config](kind: type[T], document: dict[str, Any], path: Path) -> T:
    """The config of one ``kind`` that the ``document`` from a file holds.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        lines = [f"{path}: {_said(item)}" for item in error.errors()]
        raise UserError("\n".join(lines)) from None


def _said(error: Any) -> str:
    """One error of pydantic's. One of our own says what was given, one of its does not."""
    place = ".".join(map(str, error["loc"]))
    said = f"{error['msg']}, got {error['input']!r}"
    if error["type"] == "value_error":
        said = error["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in the file.

    Raises:
        UserError: naming the file, when it cannot be read or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return document


def _valued(**values: Any) -> list[str]:
    """``name=value`` as ``--name value``, dashes for underscores, a pair as ``(a,b)``.

    What is None or False is left out.
    """
    return [
        word
        for name, value in values.items()
        if value is not None and value is not False
        for word in (*_switch(name), _written(value))
    ]


def _switch(name: str) -> list[str]:
    return [f"--{name.replace('_', '-')}"]


def _written(value: Any) -> str:
    return f"({','.join(map(str, value))})" if isinstance(value, tuple) else str(value)

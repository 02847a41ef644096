"""A GPT model."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.files import Config
from megatron_helix.run_config.words import switch, valued


def rotated_channels(position_embedding: str, rotary_percent: float, kv_channels: int) -> int:
    """How many channels of a head Megatron's rotary embeddings rotate; 0 without them.

    Its ``YarnRotaryEmbedding`` has frequencies for all of them, whatever ``--rotary-percent``.
    """
    if position_embedding == "yarn":
        return kv_channels
    return int(kv_channels * rotary_percent) if position_embedding in ("rope", "mrope") else 0


class ModelConfig(Config):
    """A GPT model in Megatron's terms: but for three, the keys are the names of its flags.

    Attributes:
        name: of the model.
        add_bias_linear: whether linears have biases; Megatron's flag is ``--disable-bias-linear``.
        vocab_size: what the planner counts with; experiments tokenise bytes, 256 of them.
        max_position_embeddings: the longest sequence; without it that of the run.
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
        percent = self.rotary_percent or 1.0
        return rotated_channels(self.position_embedding_type, percent, self.kv_channels)

    def flags(self) -> list[str]:
        """Megatron's flags for the model. Dropout is off."""
        words = valued(attention_dropout=0, hidden_dropout=0)
        if not self.add_bias_linear:
            words.append("--disable-bias-linear")
        if self.num_query_groups:
            words.append("--group-query-attention")
        if self.num_experts:
            words += valued(
                moe_router_topk=self.moe_router_topk,
                moe_router_load_balancing_type="none",
                moe_token_dispatcher_type="alltoall",
            )
        for name in type(self).model_fields:
            value = None if name in _NO_FLAGS else getattr(self, name)
            words += switch(name) if value is True else valued(**{name: value})
        return words


# Said in another way above, by the experiment, or to a reader.
_NO_FLAGS = {"name", "moe_router_topk", "add_bias_linear", "vocab_size", "departures"}

"""How ranks share a model."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from megatron_helix.basics.errors import UserError
from megatron_helix.run_config.core_attention import CoreAttention
from megatron_helix.run_config.files import Config
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.run_config.words import valued


class LayoutConfig(Config):
    """How the ranks share the work: stock (``tp``) or helix (``m``, ``n``), with PP and EP beside.

    The data-parallel size is what is left of the ranks. What a layout needs beside its flags is in
    :mod:`megatron_helix.options.environment`.

    Attributes:
        name: of the layout; it names folders.
        tp: tensor-parallel ranks of a stock layout, instead of ``m`` and ``n``.
        m: segments that every head's dimension is cut into; m x n ranks share a layer.
        n: head groups that the heads are cut into.
        exchange: what moves over the dim axis: ``activations``, ``weights`` or ``scores``; without
            it ``auto``, what is predicted to cost least.
        split: which tokens a rank attends for, by ``batch`` or by ``sequence``; without it
            ``auto``.
        gather: how often the exchange ``weights`` gathers a weight: every ``microbatch`` without
            it, ``once`` a step, or once a ``step`` with the gradients.
        gather_layers: of a pipeline stage, its first ones: only they gather as ``gather`` says, the
            others in every micro-batch. Without it all do.
        core_attention: another than the layer spec's, in a stock layout too. Without it the layer
            spec's, where a helix run that says nothing takes ``auto``: what is compared differs in
            core attention only where the file says so.
        distributed_optimizer: whether data-parallel ranks share out the optimizer's states.
        fsdp: fully sharded data parallelism, Megatron's own (strategy ``optim_grads_params``) or
            torch's: a data-parallel rank keeps its part of weights, gradients and optimizer states,
            and gathers a layer's weights for use.
        gtp: of these ranks each keeps 1/gtp of every weight and gathers it for use (Megatron's
            generalized tensor parallelism, ``--tensor-parallel-num-weight-shards``, over tp).
        pp: stages of the pipeline.
        ep: ranks that share out the experts of an MoE model.
        etp: ranks that share each of its experts.
        cp: ranks that share out the tokens of a sequence.
        micro_batch: sequences of a micro-batch, of one replica.
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
    gather_layers: PositiveInt | None = None
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
            for key in ("exchange", "split", "gather", "gather_layers"):
                if (value := getattr(self, key)) is not None:
                    raise UserError(
                        f"{key}: must be left out of a stock layout (tp), got {value}; say m and n"
                        " instead of tp for a helix layout"
                    )
        if self.gather_layers and (self.gather or "microbatch") == "microbatch":
            raise UserError(
                f"gather_layers: needs gather: once or step, got {self.gather_layers} and"
                f" {self.gather or 'no gather'}; say gather, or leave it out"
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
        for key in ("pp", "ep") if self.fsdp == "torch_fsdp2" else ("pp",):
            if (value := getattr(self, key)) > 1:
                raise UserError(
                    f"{key}: must be 1 with fsdp: {self.fsdp}, which Megatron (0.19) runs without"
                    f" it, got {value}; use 1"
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
        if not self.trains_in(precision):
            raise UserError(
                f"fsdp: {self.fsdp} trains in fp32 or bf16 in Megatron, got {precision}; use one of"
                " these, or distributed_optimizer"
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

    def trains_in(self, precision: str) -> bool:
        """Whether Megatron trains this layout in a precision.

        Its torch FSDP2 scales no loss. Its own FSDP fails as it scales gradients back (0.19.2):
        a rank that has no part of a short tensor has no gradient of it.
        """
        return self.fsdp is None or precision != "fp16"

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
        words = valued(pipeline_model_parallel_size=self.pp, micro_batch_size=self.micro_batch)
        if self.is_helix:
            words += valued(helix_m=self.m, helix_n=self.n)
            words += valued(helix_exchange=self.exchange, helix_split=self.split)
            words += valued(helix_gather=self.gather, helix_gather_layers=self.gather_layers)
        else:
            words += valued(tensor_model_parallel_size=self.tp)
        core = self.core_attention
        if self.is_helix and core is None:
            core = "spec"  # a run takes auto there, and stock beside it does not
        words += valued(helix_core_attention=core)
        if self.tensor_parallel_size > 1:
            words.append("--sequence-parallel")
        if self.cp > 1:
            words += valued(context_parallel_size=self.cp, cp_comm_type=self.cp_comm_type)
        if self.gtp > 1:
            shards = self.tensor_parallel_size * self.gtp
            words += valued(tensor_parallel_num_weight_shards=shards)
        if self.distributed_optimizer:
            words.append("--use-distributed-optimizer")
        if self.overlap_dp:
            words.append("--overlap-grad-reduce")
            words += ["--overlap-param-gather"] * self.distributed_optimizer
        if self.fsdp:
            words += _FSDP_FLAGS[self.fsdp]
        if model.num_experts:
            words += valued(
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

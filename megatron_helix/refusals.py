"""Megatron's features that are refused beside helix, as data.

:mod:`megatron_helix.compatibility` refuses and prints what stands here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A feature that is refused before any process group exists, wherever m > 1.

    Attributes:
        feature: its name.
        flag: the flag of Megatron's that asks for it.
        values: the values of the flag that are refused; empty for all (and for a switch).
        reason: why, continuing "is refused:".
    """

    feature: str
    flag: str
    reason: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RefusedByLayer:
    """What no flag of Megatron's asks for: refused where layers are made or called.

    Attributes:
        feature: its name.
        where: what meets it.
        reason: why.
        test: the test that shows the refusal, ``file::function``.
    """

    feature: str
    where: str
    reason: str
    test: str


REFUSED = (
    Refused(
        feature="Multi-latent attention",
        flag="--multi-latent-attention",
        reason="its keys and values come from a latent that all heads share, which has no head"
        " dimension to cut",
    ),
    Refused(
        feature="Linear and sparse attention variants",
        flag="--experimental-attention-variant",
        reason="it replaces the self-attention that helix cuts",
    ),
    Refused(
        feature="Packed sequences (THD)",
        flag="--sft",
        reason="sequences packed into one cannot be dealt out by batch, nor by equal chunks",
    ),
    Refused(
        feature="Packed sequences in reinforcement learning",
        flag="--rl-use-sequence-packing",
        reason="sequences packed into one cannot be dealt out by batch, nor by equal chunks",
    ),
    Refused(
        feature="Packed sequences (THD) of documents",
        flag="--dataloader-inter-document-masking",
        reason="sequences packed into one cannot be dealt out by batch, nor by equal chunks",
    ),
    Refused(
        feature="Hybrid context parallelism",
        flag="--hybrid-context-parallel",
        reason="it packs sequences, which cannot be dealt out by batch, nor by equal chunks",
    ),
    Refused(
        feature="FP8",
        flag="--fp8-format",
        reason="gathered weights and exchanged heads have no FP8 scaling factors",
    ),
    Refused(
        feature="FP4",
        flag="--fp4-format",
        reason="gathered weights and exchanged heads have no FP4 scaling factors",
    ),
    Refused(
        feature="CUDA graphs (local)",
        flag="--enable-cuda-graph",
        reason="exchanges have not been captured yet",
    ),
    Refused(
        feature="CUDA graphs (TransformerEngine)",
        flag="--external-cuda-graph",
        reason="exchanges have not been captured yet",
    ),
    Refused(
        feature="CUDA graphs",
        flag="--cuda-graph-impl",
        values=("local", "transformer_engine", "full_iteration"),
        reason="exchanges have not been captured yet",
    ),
    Refused(
        feature="TransformerEngine's tensor-parallel overlap",
        flag="--tp-comm-overlap",
        reason="its buffers are laid out for all-gathers over the whole tensor-parallel group",
    ),
    Refused(
        feature="Generalized tensor parallelism",
        flag="--tensor-parallel-num-weight-shards",
        reason="it shards the weights that helix shards already",
    ),
    Refused(
        feature="Generalized tensor parallelism of experts",
        flag="--expert-tensor-parallel-num-weight-shards",
        reason="it has not been run beside helix",
    ),
    Refused(
        feature="Delayed weight gradients",
        flag="--delay-wgrad-compute",
        reason="gathered weights have their gradients computed with the input's",
    ),
    Refused(
        feature="Muon, SOAP",
        flag="--optimizer",
        values=("muon", "dist_muon", "adaptive_muon", "soap"),
        reason="they work on whole weight matrices, of which a rank holds a tile",
    ),
    Refused(
        feature="Overlapped expert-parallel communication",
        flag="--overlap-moe-expert-parallel-comm",
        reason="it calls the parts of a layer one by one, past the layer that plans the exchange",
    ),
    Refused(
        feature="Deferred weight gradients of the LM head",
        flag="--defer-embedding-wgrad-compute",
        reason="gathered weights have their gradients computed with the input's",
    ),
    Refused(
        feature="TransformerEngine's operation fuser",
        flag="--use-transformer-engine-op-fuser",
        reason="it replaces the MLP's linears, which gather their weights",
    ),
    Refused(
        feature="Precision by layer",
        flag="--te-precision-config-file",
        reason="gathered weights and exchanged heads have no FP8 scaling factors",
    ),
    Refused(
        feature="Kitchen's attention",
        flag="--use-kitchen-attention",
        reason="it has not been run beside helix",
    ),
    Refused(
        feature="Batch-invariant kernels",
        flag="--batch-invariant-mode",
        reason="gathered weights are multiplied by other kernels",
    ),
    Refused(
        feature="Linears made for inference",
        flag="--transformer-impl",
        values=("inference_optimized",),
        reason="their fused collectives span the whole tensor-parallel group",
    ),
    Refused(
        feature="Activations offloaded to the CPU",
        flag="--cpu-offloading-num-layers",
        reason="it has not been run beside helix",
    ),
    Refused(
        feature="Fine-grained activation offloading",
        flag="--fine-grained-activation-offloading",
        reason="it has not been run beside helix",
    ),
    Refused(
        feature="CUDA graphs in reinforcement learning",
        flag="--rl-training-cuda-graphs",
        reason="exchanges have not been captured yet",
    ),
    Refused(
        feature="Heterogeneous layers, encoded",
        flag="--heterogeneous-layers-config-encoded-json",
        reason="every layer is cut alike",
    ),
    Refused(
        feature="Hybrid (Mamba) models, old flag",
        flag="--hybrid-override-pattern",
        reason="only GPT's decoder block is cut",
    ),
    Refused(
        feature="QK clipping",
        flag="--qk-clip",
        reason="it scales the rows of whole heads, of which a rank holds a segment",
    ),
    Refused(
        feature="Megatron FSDP",
        flag="--use-megatron-fsdp",
        reason="it shards the weights that helix shards already",
    ),
    Refused(
        feature="Torch FSDP2",
        flag="--use-torch-fsdp2",
        reason="it shards the weights that helix shards already",
    ),
    Refused(
        feature="Heterogeneous layers",
        flag="--heterogeneous-layers-config-path",
        reason="every layer is cut alike",
    ),
    Refused(
        feature="Hybrid (Mamba) models",
        flag="--hybrid-layer-pattern",
        reason="only GPT's decoder block is cut",
    ),
    Refused(
        feature="Checkpoints in other formats",
        flag="--ckpt-format",
        values=("torch", "torch_dcp", "fsdp_dtensor"),
        reason="only torch_dist describes tiles by their canonical rows",
    ),
    Refused(
        feature="Checkpoints converted to another format",
        flag="--ckpt-convert-format",
        values=("torch",),
        reason="only torch_dist describes tiles by their canonical rows",
    ),
    Refused(
        feature="Local non-persistent checkpoints",
        flag="--non-persistent-ckpt-type",
        values=("local",),
        reason="they hold what lay in a rank's memory, not canonical rows",
    ),
    Refused(
        feature="The parallel sizes of a checkpoint",
        flag="--use-mp-args-from-checkpoint-args",
        reason="they would take the place of m and n",
    ),
)

REFUSED_BY_LAYER = (
    RefusedByLayer(
        feature="Cross attention",
        where="helixify() on a spec that has it (T5's decoder)",
        reason="its keys and values come from another stream, whose tokens are not dealt out",
        test="tests/test_compatibility.py::test_cross_attention_is_refused",
    ),
    RefusedByLayer(
        feature="Packed sequences (THD) from an entry point of your own",
        where="the first forward that is given packed_seq_params",
        reason="sequences packed into one cannot be dealt out by batch, nor by equal chunks",
        test="tests/test_compatibility.py::test_packed_sequences_are_refused_in_a_layer",
    ),
    RefusedByLayer(
        feature="A mask of padding, for MoE layers under weights with a batch split",
        where="the first forward that is given padding_mask",
        reason="it speaks of stock's tokens of a rank, and the block has others there",
        test="tests/test_compatibility.py::test_a_mask_of_padding_is_refused_in_the_order_of_the_block",
    ),
    RefusedByLayer(
        feature="Self-attention of a class of one's own",
        where="helixify() on a spec that has it (--spec)",
        reason="only megatron-core's SelfAttention is cut, whatever a class derived from it does",
        test="tests/test_compatibility.py::test_a_self_attention_of_ones_own_is_refused",
    ),
)

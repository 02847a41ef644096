"""Megatron's features beside helix, as data: what works and which test says so, what is refused.

:mod:`megatron_helix.compatibility` refuses and prints what stands here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Works:
    """A feature that gives stock's numbers under helix.

    Attributes:
        feature: its name.
        flags: those of Megatron's that turn it on.
        test: the test that shows it, ``file::function``; none for what needs a GPU.
        note: what a user should know; for what has no test, that it was not run.
    """

    feature: str
    flags: str
    test: str | None = None
    note: str = ""


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


_PARITY = "tests/test_parity.py::test_training_is_as_stock"
_HALF = "tests/test_features.py::test_half_precision_is_as_near_to_stock_as_stock_to_itself"
_FEATURES = "tests/test_features.py::test_a_feature_of_megatron_gives_the_same_numbers"

WORKS = (
    Works(feature="Sequence parallelism", flags="--sequence-parallel", test=_PARITY),
    Works(feature="Pipeline parallelism", flags="--pipeline-model-parallel-size", test=_PARITY),
    Works(
        feature="Virtual pipeline stages",
        flags="--num-layers-per-virtual-pipeline-stage",
        test=_FEATURES,
    ),
    Works(
        feature="Data parallelism, distributed optimizer",
        flags="--use-distributed-optimizer",
        test=_PARITY,
    ),
    Works(
        feature="Overlapped gradient reduction and parameter gathering",
        flags="--overlap-grad-reduce --overlap-param-gather",
        test=_FEATURES,
        note="not with --helix-gather step",
    ),
    Works(
        feature="Context parallelism",
        flags="--context-parallel-size",
        test="tests/test_features.py::test_context_parallelism_gives_the_same_numbers",
        note="batch split only. Megatron runs it with TransformerEngine's core attention; the test"
        " has one for CPUs in its place, TransformerEngine's ring itself was not run",
    ),
    Works(
        feature="Expert parallelism",
        flags="--num-experts --expert-model-parallel-size",
        test=_PARITY,
    ),
    Works(
        feature="Expert tensor parallelism",
        flags="--expert-tensor-parallel-size",
        test=_FEATURES,
    ),
    Works(
        feature="Shared experts",
        flags="--moe-shared-expert-intermediate-size",
        test=_FEATURES,
    ),
    Works(
        feature="MoE auxiliary losses",
        flags="--moe-router-load-balancing-type",
        test=_FEATURES,
        note="seq_aux_loss counts by sequence: it keeps stock's token order",
    ),
    Works(feature="Gradient accumulation", flags="--global-batch-size", test=_PARITY),
    Works(
        feature="Recompute, full and selective",
        flags="--recompute-granularity",
        test="tests/test_parity.py::test_recomputation_changes_nothing",
    ),
    Works(feature="bfloat16", flags="--bf16", test=_HALF),
    Works(
        feature="float16, dynamic loss scale",
        flags="--fp16 --initial-loss-scale",
        test=_HALF,
    ),
    Works(feature="Grouped queries", flags="--group-query-attention", test=_PARITY),
    Works(
        feature="Any tensor-parallel degree",
        flags="--helix-n auto",
        test="tests/test_any_degree.py::test_a_degree_that_stock_refuses_gives_stocks_numbers",
        note="more ranks than heads or query groups, uneven counts",
    ),
    Works(feature="QK layernorm", flags="--qk-layernorm", test=_PARITY),
    Works(feature="Attention output gate", flags="--attention-output-gate", test=_PARITY),
    Works(feature="Partial rotary embeddings", flags="--rotary-percent", test=_PARITY),
    Works(
        feature="Interleaved and scaled rotary embeddings, layers without",
        flags="--rotary-interleaved --use-rope-scaling --no-rope-freq",
        test=_FEATURES,
    ),
    Works(feature="QKV bias, QK L2 norm", flags="--add-qkv-bias --qk-l2-norm", test=_FEATURES),
    Works(feature="Sliding window", flags="--window-size", test=_FEATURES),
    Works(
        feature="Documents apart, loss by token",
        flags="--reset-attention-mask --reset-position-ids --eod-mask-loss"
        " --calculate-per-token-loss",
        test=_FEATURES,
    ),
    Works(feature="Maximal update parametrisation", flags="--use-mup", test=_FEATURES),
    Works(feature="Dense and MoE layers in one model", flags="--moe-layer-freq", test=_FEATURES),
    Works(
        feature="Learnable softmax offset",
        flags="--softmax-type",
        test="tests/test_parity.py::test_learnable_softmax_offsets",
    ),
    Works(
        feature="FlexAttention for core attention",
        flags="--helix-core-attention flex",
        test="tests/test_flex_attention.py::test_flex_is_stock",
        note="forward, on a CPU; a run needs a GPU, where it trained 21 steps at TP=1 (one H100)."
        " Not with attention dropout, context parallelism, multi-latent attention or"
        " --helix-exchange scores",
    ),
    Works(feature="Multi-token prediction", flags="--mtp-num-layers", test=_FEATURES),
    Works(
        feature="Checkpoints in torch_dist format, any layout to any other",
        flags="--save --load",
        test="tests/test_checkpoint.py::test_one_layout_goes_on_from_anothers_checkpoint",
    ),
    Works(
        feature="Optimizer state in checkpoints, any layout to any other",
        flags="--save --load",
        test="tests/test_checkpoint.py::test_layouts_pass_a_checkpoint_on_bit_for_bit",
        note="a distributed optimizer's too, always as --dist-ckpt-optim-fully-reshardable; a stock"
        " run that helix is to go on from must say so itself. In a pipeline with tied embeddings"
        " this format of Megatron's can lose parameters' ends, for stock as well: it warns of it",
    ),
    Works(
        feature="Asynchronous saving",
        flags="--async-save",
        test="tests/test_checkpoint.py::test_an_asynchronous_save_is_the_same_checkpoint",
    ),
)

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
)

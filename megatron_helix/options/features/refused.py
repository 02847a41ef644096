"""What is refused: attention of another kind, and models, rows and precisions that follow from it.

What is refused of the run around the model stands in :mod:`.refused_runs`.
"""

from megatron_helix.options.features.refused_runs import RUNS
from megatron_helix.options.features.rows import Refused, RefusedByLayer

_SCALES = "gathered weights and exchanged heads have no FP8 scaling factors"
_GRAPHS_BY_NAME = "what may be captured is said of --cuda-graph-impl, which took its place"
_NOT_RUN = "it has not been run beside helix"

_ATTENTION = (
    Refused(
        feature="Multi-latent attention",
        asks="--multi-latent-attention",
        field="multi_latent_attention",
        reason="its keys and values come from a latent that all heads share, which has no head"
        " dimension to cut",
        parts="--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim"
        " --cache-mla-latents --mla-down-proj-fusion",
    ),
    Refused(
        feature="Linear and sparse attention variants",
        asks="--experimental-attention-variant",
        field="experimental_attention_variant",
        reason="it replaces the self-attention that helix cuts",
        parts="--linear-attention-freq --linear-conv-kernel-dim --linear-key-head-dim"
        " --linear-value-head-dim --linear-num-key-heads --linear-num-value-heads"
        " --dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk --dsa-indexer-topk-freq"
        " --dsa-indexer-skip-topk-offset --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss"
        " --dsa-kernel-backend --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation"
        " --no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32"
        " experimental_attention_variant_loss_scale_func",
    ),
    Refused(
        feature="Kitchen's attention",
        asks="--use-kitchen-attention",
        field="use_kitchen_attention",
        reason=_NOT_RUN,
        parts="--kitchen-attention-backend",
    ),
    Refused(feature="Kitchen's linears", asks="use_kitchen", field="use_kitchen", reason=_NOT_RUN),
    Refused(
        feature="QK clipping",
        asks="--qk-clip",
        field="qk_clip",
        reason="it scales the rows of whole heads, of which a rank holds a segment",
        parts="--qk-clip-alpha --qk-clip-threshold",
    ),
    Refused(
        feature="Largest attention logit in the log",
        asks="--log-max-attention-logit",
        field="log_max_attention_logit",
        reason="it is the largest of the tokens that one rank attends for",
    ),
    Refused(
        feature="Positions of three axes, and relative ones",
        asks="--position-embedding-type",
        field="position_embedding_type",
        values=("mrope", "relative"),
        reason="they belong to multimodal models and to T5",
        parts="--mrope-section --relative-attention-num-buckets --relative-attention-max-distance",
    ),
    Refused(
        feature="Batch-invariant kernels",
        asks="--batch-invariant-mode",
        field="batch_invariant_mode",
        reason="gathered weights are multiplied by other kernels",
    ),
    Refused(
        feature="Residual and norm in one kernel",
        asks="--fused-residual-rmsnorm",
        field="fused_residual_rmsnorm",
        reason=_NOT_RUN,
    ),
)

_PACKING = (
    Refused(
        feature="Packed sequences in reinforcement learning",
        asks="--rl-use-sequence-packing",
        field="rl_use_sequence_packing",
        reason="megatron.rl is not in the wheel, and " + _NOT_RUN,
        parts="--rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo",
    ),
    Refused(
        feature="Hybrid context parallelism",
        asks="--hybrid-context-parallel",
        field="hybrid_context_parallel",
        reason="it cuts long documents over ranks, and so does the dim axis",
        parts="--max-seqlen-per-dp-cp-rank",
    ),
    Refused(
        feature="Hierarchical context parallelism",
        asks="--hierarchical-context-parallel-sizes",
        field="hierarchical_context_parallel_sizes",
        reason=_NOT_RUN,
    ),
)

_NARROW = (
    Refused(
        feature="FP8 with a scale for every 32 elements",
        asks="--fp8-recipe",
        field="fp8_recipe",
        values=("mxfp8", "custom"),
        reason="Hopper does not multiply it, and a shard cut from it has not been gathered",
    ),
    Refused(
        feature="Parameters in FP8",
        asks="--fp8-param-gather",
        field="fp8_param_gather",
        reason="the scale of a parameter would be that of a shard, and a gathered weight has one",
    ),
    Refused(
        feature="FP8 attention",
        asks="fp8_dot_product_attention",
        field="fp8_dot_product_attention",
        reason=_SCALES,
        parts="fp8_multi_head_attention",
    ),
    Refused(
        feature="FP4",
        asks="--fp4-format",
        field="fp4",
        reason="gathered weights and exchanged heads have no FP4 scaling factors",
        parts="--fp4-recipe --fp4-quantizer-factory --fp4-param-gather fp4_param",
    ),
    Refused(
        feature="Precision by layer",
        asks="--te-precision-config-file",
        field="te_precision_config_file",
        reason=_SCALES,
    ),
    Refused(
        feature="Quantization by recipe",
        asks="quant_recipe",
        field="quant_recipe",
        reason=_SCALES,
    ),
)

_GRAPHS = (
    Refused(
        feature="CUDA graphs (old flag)",
        asks="--enable-cuda-graph",
        field="enable_cuda_graph",
        reason=_GRAPHS_BY_NAME,
    ),
    Refused(
        feature="CUDA graphs of TransformerEngine (old flag)",
        asks="--external-cuda-graph",
        field="external_cuda_graph",
        reason=_GRAPHS_BY_NAME,
    ),
    Refused(
        feature="CUDA graphs in reinforcement learning",
        asks="--rl-training-cuda-graphs",
        field="rl_training_cuda_graphs",
        reason=_NOT_RUN,
    ),
)

_OTHER_MODELS = (
    Refused(
        feature="Heterogeneous layers",
        asks="--heterogeneous-layers-config-path",
        field="heterogeneous_layers_config_path",
        reason="every layer is cut alike",
        parts="hetereogenous_dist_checkpoint",
    ),
    Refused(
        feature="Heterogeneous layers, encoded",
        asks="--heterogeneous-layers-config-encoded-json",
        field="heterogeneous_layers_config_encoded_json",
        reason="every layer is cut alike",
    ),
    Refused(
        feature="Heterogeneous layers of a config",
        asks="heterogeneous_block_specs",
        field="heterogeneous_block_specs",
        reason="every layer is cut alike",
    ),
    Refused(
        feature="Hybrid (Mamba) models",
        asks="--hybrid-layer-pattern",
        field="hybrid_layer_pattern",
        reason="only GPT's decoder block is cut",
        parts="--mtp-hybrid-override-pattern --mamba-state-dim --mamba-head-dim --mamba-num-groups"
        " --mamba-num-heads --disable-mamba-mem-eff-path --mamba-training-ssm-states-dtype"
        " --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype",
    ),
    Refused(
        feature="Hybrid (Mamba) models, old flag",
        asks="--hybrid-override-pattern",
        field="hybrid_override_pattern",
        reason="only GPT's decoder block is cut",
    ),
    Refused(
        feature="Hybrid (Mamba) models of a config",
        asks="--is-hybrid-model",
        field="is_hybrid_model",
        reason="only GPT's decoder block is cut",
    ),
)

REFUSED = (*_ATTENTION, *_PACKING, *_NARROW, *_GRAPHS, *_OTHER_MODELS, *RUNS)

REFUSED_BY_LAYER = (
    RefusedByLayer(
        feature="Cross attention",
        where="helixify() on a spec that has it (T5's decoder)",
        reason="its keys and values come from another stream, whose tokens are not dealt out",
        test="tests/layers/test_layer_refusals.py::test_cross_attention_is_refused",
    ),
    RefusedByLayer(
        feature="Packed sequences (THD) with padding between documents, or cut over ranks",
        where="the first forward whose packed_seq_params have other cu_seqlens_*_padded than"
        " cu_seqlens_q, or a cp_group",
        reason="padding is dealt out as a part of its document, and a row as a whole",
        test="tests/exchange/test_documents.py::test_bad_rows_are_refused",
    ),
    RefusedByLayer(
        feature="Packed sequences (THD) under scores, a batch split or context parallelism",
        where="helixify() and the first forward; before any rank is started with Megatron's flags",
        reason="documents are apart, and a row is one sequence",
        test="tests/exchange/test_packed.py::test_what_cannot_be_packed_is_refused",
    ),
    RefusedByLayer(
        feature="Packed sequences (THD) of several rows, seen from both sides, or while inferring",
        where="the first forward whose packed_seq_params come with a micro-batch that is not"
        " flattened, a mask type that is not causal or an inference_context",
        reason="a row is one sequence, of which a piece sees what is before it",
        test="tests/layers/test_layer_refusals.py::test_what_packed_rows_do_not_go_with_is_refused",
    ),
    RefusedByLayer(
        feature="A mask of padding, for MoE layers under weights with a batch split",
        where="the first forward that is given padding_mask",
        reason="it speaks of stock's tokens of a rank, and the block has others there",
        test="tests/layers/test_layer_refusals.py"
        "::test_a_mask_of_padding_is_refused_in_the_order_of_the_block",
    ),
    RefusedByLayer(
        feature="Self-attention of a class of one's own",
        where="helixify() on a spec that has it (--spec)",
        reason="only megatron-core's SelfAttention is cut, whatever a class derived from it does",
        test="tests/layers/test_layer_refusals.py::test_a_self_attention_of_ones_own_is_refused",
    ),
)

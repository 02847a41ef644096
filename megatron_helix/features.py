"""Megatron's features that work beside helix, as data, with the test that says so.

:mod:`megatron_helix.compatibility` prints what stands here; its other half are the refusals
(:mod:`megatron_helix.refusals`).
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
        note="not with --helix-gather step; the forward pass begins no gather of weights early",
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
    Works(
        feature="Dropout",
        flags="--attention-dropout --hidden-dropout",
        test="tests/test_dropout_training.py::test_the_stream_s_masks_are_stock_s",
        note="docs/exactness.md says which masks are stock's, and which are drawn anew",
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

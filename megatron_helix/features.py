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
        examples: flags that turn it on, each a command line's end, for ``helix fuzz`` to draw from;
            none for what has no numbers to compare on CPU ranks in single precision.
        needs: what a case must have for them, in the words of :attr:`fuzz.case.Case.tags`: dense,
            moe, gqa, sp, pp, filled (pipeline stages divide the micro-batches), dp, ep, bias,
            biasless, tied, untied, or the kind of positions. What else does not go together
            Megatron refuses.
    """

    feature: str
    flags: str
    test: str | None = None
    note: str = ""
    examples: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


_PARITY = "tests/test_parity.py::test_training_is_as_stock"
_HALF = "tests/test_features.py::test_half_precision_is_as_near_to_stock_as_stock_to_itself"
_FEATURES = "tests/test_features.py::test_a_feature_of_megatron_gives_the_same_numbers"

_DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"

WORKS = (
    Works(feature="Sequence parallelism", flags="--sequence-parallel", test=_PARITY),
    Works(feature="Pipeline parallelism", flags="--pipeline-model-parallel-size", test=_PARITY),
    Works(
        feature="Virtual pipeline stages",
        flags="--num-layers-per-virtual-pipeline-stage",
        test=_FEATURES,
        examples=("--num-layers 4 --num-layers-per-virtual-pipeline-stage 1",),
        needs=("filled",),
    ),
    Works(
        feature="Data parallelism, distributed optimizer",
        flags="--use-distributed-optimizer",
        test=_PARITY,
        examples=(_DISTRIBUTED,),
    ),
    Works(
        feature="Overlapped gradient reduction and parameter gathering",
        flags="--overlap-grad-reduce --overlap-param-gather",
        test=_FEATURES,
        note="not with --helix-gather step; the forward pass begins no gather of weights early",
        examples=(
            f"{_DISTRIBUTED} --overlap-grad-reduce",
            f"{_DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather",
        ),
        needs=("dp",),
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
        examples=("--moe-shared-expert-intermediate-size 48",),
        needs=("moe",),
    ),
    Works(
        feature="MoE auxiliary losses",
        flags="--moe-router-load-balancing-type",
        test=_FEATURES,
        note="seq_aux_loss counts by sequence: it keeps stock's token order",
        examples=(
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-z-loss-coeff 0.01",
        ),
        needs=("moe",),
    ),
    Works(feature="Gradient accumulation", flags="--global-batch-size", test=_PARITY),
    Works(
        feature="Recompute, full and selective",
        flags="--recompute-granularity",
        test="tests/test_parity.py::test_recomputation_changes_nothing",
        examples=(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            "--recompute-granularity selective --recompute-modules core_attn",
            # Beside biases of the MLP stock recomputes without an end.
            "--recompute-granularity selective --recompute-modules core_attn mlp"
            " --disable-bias-linear",
        ),
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
    Works(
        feature="QK layernorm",
        flags="--qk-layernorm",
        test=_PARITY,
        examples=(
            "--qk-layernorm",
            "--qk-layernorm --normalization RMSNorm",
        ),
    ),
    Works(
        feature="Attention output gate",
        flags="--attention-output-gate",
        test=_PARITY,
        examples=("--attention-output-gate",),
    ),
    Works(
        feature="Partial rotary embeddings",
        flags="--rotary-percent",
        test=_PARITY,
        examples=("--rotary-percent 0.5",),
        needs=("rope",),
    ),
    Works(
        feature="Interleaved and scaled rotary embeddings, layers without",
        flags="--rotary-interleaved --use-rope-scaling --no-rope-freq",
        test=_FEATURES,
        examples=(
            "--rotary-interleaved",
            "--use-rope-scaling",
            "--no-rope-freq 2",
            "--rotary-base 100",
        ),
        needs=("rope",),
    ),
    Works(
        feature="QKV bias, QK L2 norm",
        flags="--add-qkv-bias --qk-l2-norm",
        test=_FEATURES,
        examples=(
            "--add-qkv-bias",
            "--add-qkv-bias --qk-l2-norm",
        ),
        needs=("biasless",),
    ),
    Works(
        feature="Sliding window",
        flags="--window-size",
        test=_FEATURES,
        examples=(
            "--window-size (5,0)",
            "--window-size (5,0) --window-attn-skip-freq 2",
        ),
    ),
    Works(
        feature="Documents apart, loss by token",
        flags="--reset-attention-mask --reset-position-ids --eod-mask-loss"
        " --calculate-per-token-loss",
        test=_FEATURES,
        examples=(
            "--reset-attention-mask --reset-position-ids --eod-mask-loss",
            "--calculate-per-token-loss",
            "--eod-mask-loss --calculate-per-token-loss",
        ),
    ),
    Works(
        feature="Maximal update parametrisation",
        flags="--use-mup",
        test=_FEATURES,
        examples=("--use-mup --mup-base-hidden-size 16",),
        needs=("untied",),
    ),
    Works(
        feature="Dense and MoE layers in one model",
        flags="--moe-layer-freq",
        test=_FEATURES,
        examples=(
            "--num-layers 2 --moe-layer-freq [0,1]",
            "--num-layers 2 --moe-layer-freq [1,0] --moe-ffn-hidden-size 48",
        ),
        needs=("moe",),
    ),
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
    Works(
        feature="Multi-token prediction",
        flags="--mtp-num-layers",
        test=_FEATURES,
        examples=("--mtp-num-layers 1",),
    ),
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

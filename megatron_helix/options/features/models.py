"""What works of the features that make a model."""

from megatron_helix.options.features.rows import Works

_DRAWN = "tests/fuzz/test_slice.py::test_helix_gives_stocks_numbers"
_PARITY = "tests/test_parity.py::test_training_is_as_stock"
_FEATURES = "tests/test_features.py::test_a_feature_of_megatron_gives_the_same_numbers"

MODELS = (
    Works(
        feature="Layers of Megatron's local implementation and of TransformerEngine",
        names="--transformer-impl",
        test=_PARITY,
        note="the latter on GPUs (docs/exactness.md)",
    ),
    Works(
        feature="Sizes",
        names="--num-layers --hidden-size --num-attention-heads --kv-channels --ffn-hidden-size"
        " --max-position-embeddings --vocab-size",
        test=_PARITY,
    ),
    Works(
        feature="Padding of the vocabulary",
        names="--make-vocab-size-divisible-by --padded-vocab-size should_pad_vocab",
        test=_DRAWN,
        examples=(
            "--make-vocab-size-divisible-by 24",
            "--padded-vocab-size 384",
        ),
        needs=("same size",),
        note="padded rows take part in the softmax, in stock as well: another padding is another"
        " loss. --padded-vocab-size makes layouts comparable",
    ),
    Works(
        feature="Grouped queries",
        names="--group-query-attention --num-query-groups",
        test=_PARITY,
        examples=("--group-query-attention",),
        needs=("gqa",),
    ),
    Works(
        feature="Norms",
        names="--normalization --norm-epsilon --qk-layernorm --qk-l2-norm",
        test=_PARITY,
        examples=(
            "--normalization RMSNorm",
            "--norm-epsilon 1e-3",
            "--qk-layernorm",
            "--qk-l2-norm",
        ),
    ),
    Works(
        feature="Norms with weights around zero",
        names="--apply-layernorm-1p",
        test="tests/layers/test_norm.py::test_the_norm_before_a_linear_is_rounded_once",
        note="TransformerEngine's norms have them, the local implementation's do not",
    ),
    Works(
        feature="Residual stream from behind the norm",
        names="--apply-residual-connection-post-layernorm",
        test=_DRAWN,
        examples=("--apply-residual-connection-post-layernorm",),
    ),
    Works(
        feature="Attention output gate",
        names="--attention-output-gate",
        test=_PARITY,
        examples=("--attention-output-gate",),
    ),
    Works(
        feature="Biases",
        names="--disable-bias-linear --add-qkv-bias",
        test=_FEATURES,
        examples=("--disable-bias-linear", "--disable-bias-linear --add-qkv-bias"),
    ),
    Works(
        feature="Activation functions",
        names="--swiglu --squared-relu --openai-gelu --quick-geglu --glu-linear-offset"
        " --activation-func-clamp-value gated_linear_unit activation_func",
        test=_DRAWN,
        examples=(
            "--swiglu",
            "--squared-relu",
            "--openai-gelu",
            "--quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0",
        ),
    ),
    Works(
        feature="Rotary embeddings",
        names="--rotary-base --rotary-percent --rotary-interleaved"
        " --rotary-seq-len-interpolation-factor --use-rope-scaling --rope-scaling-factor"
        " --no-rope-freq rope_scaling seq_len_interpolation_factor",
        test=_DRAWN,
        examples=(
            "--rotary-percent 0.5",
            "--rotary-interleaved --rotary-base 500",
            "--rotary-seq-len-interpolation-factor 2",
            "--use-rope-scaling --rope-scaling-factor 4",
            "--num-layers 2 --no-rope-freq [0,1]",
        ),
        needs=("rope",),
    ),
    Works(
        feature="Positions",
        names="--position-embedding-type",
        test=_DRAWN,
        examples=(
            "--position-embedding-type learned_absolute",
            "--position-embedding-type none",
            "--position-embedding-type rope",
        ),
    ),
    Works(
        feature="YaRN",
        names="--yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow"
        " --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int"
        " --rotary-scaling-factor --mscale --mscale-all-dim",
        test=_DRAWN,
        examples=(
            "--position-embedding-type yarn --yarn-original-max-position-embeddings 16"
            " --rotary-scaling-factor 2 --yarn-beta-fast 16 --yarn-beta-slow 2 --mscale 0.9"
            " --mscale-all-dim 0.8 --no-yarn-correction-range-round-to-int",
            "--position-embedding-type yarn --yarn-original-max-position-embeddings 16"
            " --rotary-scaling-factor 4 --yarn-correction-range-round-to-int",
        ),
    ),
    Works(
        feature="Sliding window",
        names="--window-size --window-attn-skip-freq",
        test=_FEATURES,
        examples=(
            "--window-size (8,0)",
            "--window-size (6,0) --window-attn-skip-freq 2",
            "--num-layers 2 --window-size (6,0) --window-attn-skip-freq [1,0]",
        ),
    ),
    Works(
        feature="Softmax: offset, scale, precision",
        names="--softmax-type --apply-query-key-layer-scaling softmax_scale",
        test=_DRAWN,
        examples=("--softmax-type off-by-one", "--apply-query-key-layer-scaling"),
        note="learnable offsets: tests/test_parity.py::test_learnable_softmax_offsets",
    ),
    Works(
        feature="Packed sequences (THD)",
        names="--sft --dataloader-inter-document-masking",
        test="tests/test_packed_parity.py::test_packed_rows_train_as_stock",
        examples=(
            "--dataloader-inter-document-masking",
            "--dataloader-inter-document-masking --eod-mask-loss",
        ),
        needs=("packs",),
        note="with activations and weights, any exchange's sequence split; from an entry point of"
        " one's own by packed_seq_params. By TransformerEngine's attention over NCCL two ranks on"
        " one H200 trained as stock, five steps; two H200 took times, before attention went gap by"
        " gap",
    ),
    Works(
        feature="Core attention on pieces of the queries",
        names="",
        test="tests/kernels/test_prefix_attention.py::test_prefix_is_stock",
        note="--helix-core-attention prefix. On CPUs, 14 steps at TP=2 and 2x1 on two H200, and 20"
        " in fp16 on one, within rounding of the unfused path. Not with packed sequences, context"
        " parallelism, multi-latent attention or --helix-exchange scores",
    ),
    Works(
        feature="Core attention with a run's past and its own square apart",
        names="",
        test="tests/kernels/test_split_attention.py::test_split_is_stock",
        note="--helix-core-attention split. Up to 256 channels a head; on CPUs, on a GPU"
        " its kernels alone. Not with attention dropout, windows, softmax offsets, masks of"
        " documents, or what prefix is not for",
    ),
    Works(
        feature="FlexAttention for core attention",
        names="",
        test="tests/kernels/test_flex_attention.py::test_flex_is_stock",
        note="--helix-core-attention flex. Forward, on a CPU; a run needs a GPU, where it trained"
        " 21 steps at TP=1 (one H100). Not with attention dropout, packed sequences, context"
        " parallelism, multi-latent attention or --helix-exchange scores",
    ),
    Works(
        feature="ffpa-attn for core attention",
        names="",
        test="tests/options/test_core_attention.py::test_what_ffpa_lacks_is_refused",
        note="--helix-core-attention ffpa. Needs Hopper, 320 to 512 channels a head and half"
        " precision; its kernels ran on one H200, alone. Not with attention dropout, windows,"
        " softmax offsets, masks of documents, or what prefix is not for",
    ),
    Works(
        feature="Embeddings",
        names="--untie-embeddings-and-output-weights --no-clone-scatter-output-in-embedding"
        " share_embeddings_and_output_weights parallel_output scatter_embedding_sequence_parallel",
        test=_DRAWN,
        examples=(
            "--untie-embeddings-and-output-weights",
            "--no-clone-scatter-output-in-embedding",
        ),
    ),
    Works(
        feature="Fused cross entropy",
        names="--cross-entropy-loss-fusion --cross-entropy-fusion-impl",
        test=_DRAWN,
        examples=("--cross-entropy-loss-fusion --cross-entropy-fusion-impl native",),
        note="native; TransformerEngine's was not run",
    ),
    Works(
        feature="Multi-token prediction",
        names="--mtp-num-layers --mtp-loss-scaling-factor --mtp-use-repeated-layer"
        " --mtp-detach-heads mtp_grad_scale_func",
        test=_FEATURES,
        examples=(
            "--mtp-num-layers 1",
            "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.3 --mtp-use-repeated-layer",
            "--mtp-num-layers 1 --mtp-detach-heads",
        ),
        needs=("rope", "even stream"),
        note="its projection cuts the stream: T divides --hidden-size",
    ),
    Works(
        feature="Multi-token prediction on a stage of its own",
        names="--mtp-standalone",
        test=_DRAWN,
        examples=(
            "--num-layers 2 --mtp-num-layers 1 --mtp-standalone"
            " --pipeline-model-parallel-layout Et|t|m|L",
        ),
        # With tied embeddings stock never gets past building it.
        needs=("rope", "pp", "untied", "even stream"),
        note="follows from the pipeline's layout",
    ),
    Works(
        feature="First weights",
        names="--init-method-std --embedding-init-method-std --seed init_method"
        " output_layer_init_method embedding_init_method",
        test=_DRAWN,
        examples=(
            "--init-method-std 0.04 --embedding-init-method-std 0.1",
            "--seed 77",
        ),
    ),
    Works(
        feature="Maximal update parametrisation",
        names="--use-mup --mup-width-mult --mup-base-hidden-size --mup-embedding-mult"
        " --mup-output-mult --mup-base-head-dim --mup-attn-scale-power",
        test=_FEATURES,
        examples=(
            "--use-mup --mup-base-hidden-size 32 --untie-embeddings-and-output-weights",
            "--use-mup --mup-base-hidden-size 32 --mup-embedding-mult 2 --mup-output-mult 0.5"
            " --mup-base-head-dim 8 --mup-attn-scale-power 0.5"
            " --untie-embeddings-and-output-weights",
        ),
    ),
)

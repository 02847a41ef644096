"""What works: layout, batch and run. Of models: :mod:`.models`, :mod:`.experts`."""

from megatron_helix.options.features.captured import GRAPHS
from megatron_helix.options.features.experts import EXPERTS
from megatron_helix.options.features.models import MODELS
from megatron_helix.options.features.rows import InOrder, Works

DRAWN = "tests/fuzz/test_slice.py::test_helix_gives_stocks_numbers"
PARITY = "tests/test_parity.py::test_training_is_as_stock"
FEATURES = "tests/test_features.py::test_a_feature_of_megatron_gives_the_same_numbers"
HALF = "tests/test_features.py::test_half_precision_is_as_near_to_stock_as_stock_to_itself"
SUMS = (
    "tests/layers/test_half_precision_gradients.py"
    "::test_every_weights_gradient_is_as_near_to_the_truth_as_stocks"
)
DROPOUT = "tests/test_dropout_training.py::test_the_stream_s_masks_are_stock_s"
CHECKPOINT = "tests/partition/test_checkpoint.py::test_one_layout_goes_on_from_anothers_checkpoint"
OPTIMIZER_STATE = (
    "tests/partition/test_checkpoint.py::test_layouts_pass_a_checkpoint_on_bit_for_bit"
)

PARALLEL = (
    Works(
        feature="Sequence parallelism",
        names="--sequence-parallel",
        test=PARITY,
    ),
    Works(
        feature="Any tensor-parallel degree",
        names="--tensor-model-parallel-size",
        test="tests/test_any_degree.py::test_a_degree_that_stock_refuses_gives_stocks_numbers",
        note="--helix-n auto; more ranks than heads or query groups, uneven counts, heads whose"
        " channels it does not divide",
    ),
    Works(
        feature="Features of MLPs and experts that the degree does not divide",
        names="",
        test="tests/test_uneven_features.py"
        "::test_features_that_the_ranks_do_not_divide_give_stocks_numbers",
        note="padded with zeros that stay zero, count in no norm and are in no checkpoint; of"
        " experts by their own degree. Not with activations that are not zero at zero,"
        " --log-num-zeros-in-grad, interleaved gates, experts' weights in one or, at m = 1 too,"
        " another owner of the weights or another checkpoint format",
    ),
    Works(
        feature="Pipeline parallelism",
        names="--pipeline-model-parallel-size",
        test=PARITY,
    ),
    Works(
        feature="Uneven pipeline stages",
        names="--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers"
        " --pipeline-model-parallel-layout --account-for-embedding-in-pipeline-split"
        " --account-for-loss-in-pipeline-split num_layers_in_first_pipeline_stage"
        " num_layers_in_last_pipeline_stage",
        test=DRAWN,
        examples=(
            "--num-layers 3 --decoder-first-pipeline-num-layers 1",
            "--num-layers 3 --decoder-last-pipeline-num-layers 1",
            "--num-layers 3 --pipeline-model-parallel-layout Et|ttL",
            "--num-layers 3 --account-for-embedding-in-pipeline-split",
            "--num-layers 3 --account-for-loss-in-pipeline-split",
        ),
        needs=("pp",),
    ),
    Works(
        feature="Virtual pipeline stages",
        names="--num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank"
        " --microbatch-group-size-per-virtual-pipeline-stage virtual_pipeline_model_parallel_size",
        test=FEATURES,
        examples=(
            "--num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
            "--num-layers 4 --num-virtual-stages-per-pipeline-rank 2",
        ),
        needs=("filled",),
    ),
    Works(
        feature="Data parallelism, distributed optimizer",
        names="--use-distributed-optimizer --no-use-layer-wise-param-layout",
        test=PARITY,
        examples=("--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",),
        needs=("dp",),
    ),
    Works(
        feature="Overlapped gradient reduction and parameter gathering",
        names="--overlap-grad-reduce --overlap-param-gather --no-align-grad-reduce"
        " --no-align-param-gather grad_sync_func param_sync_func no_sync_func",
        test=FEATURES,
        examples=(
            "--overlap-grad-reduce --no-align-grad-reduce",
            "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
            " --overlap-grad-reduce --overlap-param-gather"
            " --no-align-param-gather",
        ),
        needs=("dp",),
        note="not with --helix-gather step; the forward pass begins no gather of weights early",
    ),
    Works(
        feature="Buckets of data-parallel gradients",
        names="--ddp-num-buckets --ddp-bucket-size --ddp-pad-buckets-for-high-nccl-busbw"
        " --ddp-average-in-collective --no-gradient-reduce-div-fusion",
        test=DRAWN,
        examples=(
            "--ddp-bucket-size 3000 --overlap-grad-reduce --no-gradient-reduce-div-fusion",
            "--ddp-num-buckets 3 --overlap-grad-reduce --ddp-average-in-collective"
            " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
            " --ddp-pad-buckets-for-high-nccl-busbw",
        ),
        needs=("dp",),
    ),
    Works(
        feature="Order of ranks",
        names="--use-tp-pp-dp-mapping",
        test=DRAWN,
        examples=("--use-tp-pp-dp-mapping",),
        needs=("dp",),
    ),
    Works(
        feature="Context parallelism",
        names="--context-parallel-size --cp-comm-type",
        test="tests/test_features.py::test_context_parallelism_gives_the_same_numbers",
        note="batch split only. Megatron runs it with TransformerEngine's core attention; the test"
        " has one for CPUs in its place, TransformerEngine's ring itself was not run",
    ),
    Works(
        feature="Expert parallelism",
        names="--num-experts num_moe_experts --expert-model-parallel-size",
        test=PARITY,
    ),
    Works(
        feature="Expert tensor parallelism",
        names="--expert-tensor-parallel-size",
        test=FEATURES,
    ),
)

BATCH = (
    Works(
        feature="Gradient accumulation",
        names="--micro-batch-size --global-batch-size --seq-length",
        test=PARITY,
    ),
    Works(
        feature="Recompute, full and selective",
        names="--recompute-granularity --recompute-method --recompute-num-layers"
        " --recompute-modules --recompute-activations --moe-layer-recompute",
        test="tests/test_parity.py::test_recomputation_changes_nothing",
        examples=(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            "--recompute-granularity selective --recompute-modules core_attn",
            # Beside biases of the MLP stock recomputes without an end.
            "--recompute-granularity selective --recompute-modules mlp --disable-bias-linear",
            "--recompute-activations",
        ),
    ),
    Works(
        feature="Recompute inside experts",
        names="",
        test=DRAWN,
        examples=(
            "--recompute-granularity selective --recompute-modules moe",
            "--recompute-granularity selective --recompute-modules shared_experts"
            " --moe-shared-expert-intermediate-size 48",
            "--moe-layer-recompute",
        ),
        needs=("moe",),
    ),
    Works(
        feature="Saved activations shared out over tensor-parallel ranks",
        names="--distribute-saved-activations",
        test=DRAWN,
        examples=(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
            " --distribute-saved-activations",
        ),
        needs=("no sp", "stock tp"),
    ),
    Works(
        feature="MLP in chunks of the sequence",
        names="--mlp-chunks-for-training",
        test=DRAWN,
        examples=("--mlp-chunks-for-training 2",),
        needs=("dense",),
        note="weights are gathered once a chunk",
    ),
    Works(
        feature="Validation, batches of its own",
        names="--eval-iters --eval-interval --start-eval-at-iter --eval-micro-batch-size"
        " --eval-global-batch-size --full-validation --multiple-validation-sets"
        " --validation-set-names",
        test="tests/upstream/test_gpt_training.py::test_evaluation_micro_batches_of_their_own",
    ),
    Works(
        feature="Documents apart, loss by token",
        names="--reset-attention-mask --reset-position-ids --eod-mask-loss"
        " --calculate-per-token-loss --no-create-attention-mask-in-dataloader",
        test=FEATURES,
        examples=(
            "--reset-attention-mask --reset-position-ids --eod-mask-loss",
            "--calculate-per-token-loss",
            "--no-create-attention-mask-in-dataloader",
        ),
    ),
    Works(
        feature="Dropout",
        names="--hidden-dropout --attention-dropout",
        test=DROPOUT,
        note="which of stock's masks are drawn again: docs/exactness.md",
    ),
)

PRECISION = (
    Works(feature="bfloat16", names="--bf16 params_dtype pipeline_dtype", test=HALF),
    Works(
        feature="FP8 on Hopper",
        names="--fp8-format --fp8-recipe --fp8-quantizer-factory --fp8-margin --fp8-interval"
        " --fp8-amax-history-len --fp8-amax-compute-algo --no-fp8-wgrad --fp8-output-proj"
        " --first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16"
        " --keep-fp8-transpose-cache --reuse-grad-buf-for-mxfp8-param-ag"
        " --moe-router-padding-for-fp8 --moe-router-padding-for-quantization"
        " --use-grouped-gemm-for-dense-mlp --no-stream-ckpt-dequant fp8_param tp_only_amax_red"
        " activation_func_fp8_input_store disable_parameter_transpose_cache",
        test="tests/exchange/test_float8.py"
        "::test_what_is_gathered_in_fp8_is_the_whole_weight_quantized",
        note="recipes tensorwise, delayed and blockwise, with activations or weights; weights are"
        " gathered in FP8 with one scale for the whole (blockwise: gathered in half precision,"
        " quantized whole)",
    ),
    Works(
        feature="float16, dynamic loss scale",
        names="--fp16 --initial-loss-scale --loss-scale --min-loss-scale --loss-scale-window"
        " --hysteresis",
        test=HALF,
    ),
    Works(
        feature="Parts of a half-precision model in fp32, and the reverse",
        names="--fp16-lm-cross-entropy --attention-softmax-in-fp32",
        test=HALF,
    ),
    Works(
        feature="Precision in which gradients are added up",
        names="--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --main-grads-dtype"
        " --no-gradient-accumulation-fusion --ddp-reduce-scatter-with-fp32-accumulation"
        " --ddp-param-name-patterns-for-fp32-local-accumulation",
        test=SUMS,
        note="gradients of gathered weights are added up in the precision of Megatron's main_grad",
    ),
    Works(
        feature="Deterministic mode",
        names="--deterministic-mode",
        test="tests/test_features.py::test_deterministic_mode_gives_the_same_numbers",
    ),
)

CHECKPOINTS = (
    Works(
        feature="Checkpoints in torch_dist format, any layout to any other",
        names="--save --load --save-interval --persistent-save-interval --no-load-optim"
        " --no-load-rng --no-save-optim --no-save-rng --finetune --pretrained-checkpoint"
        " --ckpt-step --use-cpu-initialization --ckpt-format --non-persistent-ckpt-type",
        test=CHECKPOINT,
    ),
    Works(
        feature="Optimizer state in checkpoints, any layout to any other",
        names="--dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient",
        test=OPTIMIZER_STATE,
        note="a distributed optimizer's too, always as --dist-ckpt-optim-fully-reshardable; a stock"
        " run that helix is to go on from must say so itself. In a pipeline with tied embeddings"
        " this format of Megatron's can lose parameters' ends, for stock as well: it warns of it",
    ),
    Works(
        feature="Asynchronous saving",
        names="--async-save",
        test="tests/partition/test_checkpoint.py::test_an_asynchronous_save_is_the_same_checkpoint",
    ),
    Works(
        feature="A checkpoint's own arguments",
        names="--use-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args",
        test="tests/options/test_features_table.py::test_what_a_checkpoint_asks_for_is_refused_too",
        note="give the model's heads and --kv-channels too: the layout is checked against them"
        " before a checkpoint is read",
    ),
)

WORKS = (*PARALLEL, *BATCH, *PRECISION, *GRAPHS, *CHECKPOINTS, *MODELS, *EXPERTS)

IN_ORDER = (
    InOrder(
        asks="--moe-router-load-balancing-type",
        field="moe_router_load_balancing_type",
        values=("seq_aux_loss", "sinkhorn"),
        reason="balances the tokens of a sequence, or of a rank",
    ),
    InOrder(
        asks="--moe-expert-capacity-factor",
        field="moe_expert_capacity_factor",
        reason="drops the tokens of a rank beyond an expert's capacity",
    ),
    InOrder(
        asks="--moe-routing-trace-path",
        field="moe_routing_trace_path",
        reason="writes down which token went to which expert",
    ),
    InOrder(
        asks="--logits-save-dir",
        field="logits_save_dir",
        reason="writes down logits in the order of the data",
    ),
)

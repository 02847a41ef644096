"""What cannot interact with the partition, by class, each with its reason."""

from megatron_helix.options.features.apart_models import OTHERS
from megatron_helix.options.features.rows import Apart

_DATA = (
    Apart(
        what="Which rows are read, and what stands in them",
        reason="the loader makes a batch of tokens, labels and masks before a layer sees it, the"
        " same for every layout",
        names="--data-path --train-data-path --valid-data-path --test-data-path --data-args-path"
        " --per-split-data-args-path --per-dataset-sequences-path --split --mock-data"
        " --phase-transition-iterations --sample-rate --dataloader-type --num-workers"
        " --data-cache-path --no-mmap-bin-files --dataloader-fast-cache-load"
        " --dataloader-defer-npy-index-mmap --num-dataset-builder-threads"
        " --object-storage-cache-path --mid-level-dataset-surplus --allow-ambiguous-pad-tokens"
        " --fim-data --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate"
        " --fim-no-prefix --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token"
        " --fim-eod-token --sft-tokenizer-prompt-format --enable-msc --disable-msc",
    ),
    Apart(
        what="The tokenizer",
        reason="it makes token ids of text before a model is there; what of it sizes the model is"
        " the vocabulary",
        names="--tokenizer-type --tokenizer-model --tokenizer-metadata --tokenizer-special-tokens"
        " --vocab-file --merge-file --vocab-extra-ids --tiktoken-pattern"
        " --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy"
        " --no-tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast"
        " --tokenizer-hf-no-include-special-tokens --trust-remote-code --null-tokenizer-eod-id"
        " --null-tokenizer-pad-id --chat-template",
    ),
    Apart(
        what="How many steps, and of how many micro-batches",
        reason="they start and end a step, or put more whole micro-batches into it; a layer sees"
        " one micro-batch at a time",
        names="--train-iters --train-samples --rampup-batch-size --step-batch-size-schedule"
        " --decrease-batch-size-if-needed --iterations-to-skip --skip-train --test-mode"
        " --exit-interval --exit-duration-in-mins --exit-signal-handler --exit-signal"
        " --exit-signal-handler-for-dataloader --exit-signal-handler-for-training"
        " --train-sync-interval --adlr-autoresume --adlr-autoresume-interval"
        " --override-ckpt-iteration --exit-on-missing-checkpoint",
    ),
    Apart(
        what="Logits of a teacher",
        reason="they take part in the loss, which is computed from logits that are stock's",
        names="--logits-load-dir --logits-load-decode-threads --logits-load-prefetch-factor"
        " --logits-load-msc-prefetch-depth --logits-load-kd-loss-alpha --logits-load-ignore-errors"
        " --logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dtype"
        " --logits-save-dir",
    ),
)

_OPTIMIZER = (
    Apart(
        what="Elementwise optimizers",
        reason="each weight is updated from its own gradient and state, wherever it lies; the norm"
        " of all gradients is summed over tiles as over shards",
        names="--optimizer --lr --min-lr --clip-grad --weight-decay --apply-wd-to-qk-layernorm"
        " --no-weight-decay-cond-type --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum"
        " --lion-beta1 --lion-beta2 --decoupled-lr --decoupled-min-lr --freeze-all-layers"
        " --use-precision-aware-optimizer --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype"
        " --load-main-params-from-ckpt --optimizer-cpu-offload --optimizer-offload-fraction"
        " --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d"
        " --no-pin-cpu-grads --no-pin-cpu-params --optimizer-cuda-graph"
        " --dump-param-to-param-group-map --num-distributed-optimizer-instances grad_scale_func",
    ),
    Apart(
        what="Schedules of the optimizer",
        reason="they are numbers of the step",
        names="--lr-decay-style --lr-wsd-decay-style --lr-decay-iters --lr-decay-samples"
        " --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-warmup-fraction --lr-warmup-iters"
        " --lr-warmup-samples --lr-warmup-init --warmup --override-opt_param-scheduler"
        " --override-opt-param-scheduler --use-checkpoint-opt_param-scheduler"
        " --use-checkpoint-opt-param-scheduler --start-weight-decay --end-weight-decay"
        " --weight-decay-incr-style",
    ),
)

_RUN = (
    Apart(
        what="Logging, profiling, watching",
        reason="they read times, losses and states of the run and change none",
        names="--log-interval --log-params-norm --log-throughput --log-progress --timing-log-level"
        " --timing-log-option --tensorboard-dir --tensorboard-log-interval"
        " --tensorboard-queue-size --log-timers-to-tensorboard --no-log-loss-scale-to-tensorboard"
        " --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard --log-memory-interval"
        " --log-device-memory-used --log-num-zeros-in-grad --no-barrier-with-level-1-timing"
        " --log-world-size-to-tensorboard --wandb-project --wandb-exp-name --wandb-save-dir"
        " --wandb-entity --logging-level --log-energy --log-straggler --straggler-ctrlr-port"
        " --straggler-minmax-count --disable-straggler-on-startup --run-workload-inspector-server"
        " --moe-per-layer-logging --moe-routing-trace-path"
        " --moe-routing-trace-max-training-iters --moe-routing-trace-capture-logits"
        " --moe-routing-trace-capture-hidden-states --moe-routing-trace-dump-weights"
        " --config-logger-dir --profile --profile-step-start --profile-step-end"
        " --use-pytorch-profiler --pytorch-profiler-collect-shapes"
        " --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra --profile-ranks"
        " --record-memory-history --memory-snapshot-path --record-shapes --nvtx-ranges"
        " --no-one-logger --one-logger-project --one-logger-run-name --one-logger-async"
        " --app-tag-run-name --app-tag-run-version --check-weight-hash-across-dp-replicas-interval"
        " --gpu-sniff-test-interval --result-rejected-tracker-filename"
        " --flight-recorder-dump-path --flight-recorder-trace-buffer-size"
        " --no-flight-recorder-dump-on-timeout --flight-recorder-include-stack-trace"
        " --no-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec timers"
        " extra_checkpoint_metadata",
    ),
    Apart(
        what="Checks of losses and gradients, faults put in on purpose",
        reason="they look at numbers that are stock's, and stop or repeat a step",
        names="--no-check-for-nan-in-loss-and-grad --check-for-large-grads --check-for-spiky-loss"
        " --rerun-mode --error-injection-rate --error-injection-type --fault-injector-ranks"
        " --fault-injector-num-ranks --fault-injector-fault-types"
        " --fault-injector-fault-probabilities --fault-injector-fault-delay"
        " --fault-injector-delay-start-iteration --fault-injector-mtti-seconds"
        " --fault-injector-offset-seconds --fault-injector-seed",
    ),
    Apart(
        what="Restarts",
        reason="they start the same run again, from a checkpoint",
        names="--inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval"
        " --inprocess-monitor-process-interval --inprocess-progress-watchdog-interval"
        " --inprocess-heartbeat-interval --inprocess-soft-timeout --inprocess-hard-timeout"
        " --inprocess-heartbeat-timeout --inprocess-barrier-timeout"
        " --inprocess-completion-timeout --inprocess-last-call-wait"
        " --inprocess-termination-grace-time --inprocess-granularity"
        " --inprocess-active-world-size --inprocess-empty-cuda-cache --enable-ft-package"
        " --calc-ft-timeouts --ft-num-warmup-iters",
    ),
    Apart(
        what="How a checkpoint's files are written and read",
        reason="what is in them is described before by canonical rows; these say by whom, when and"
        " how strictly",
        names="--save-retain-interval --non-persistent-save-interval"
        " --non-persistent-global-ckpt-dir --auto-detect-ckpt-format"
        " --no-ckpt-fully-parallel-save --ckpt-fully-parallel-save --ckpt-fully-parallel-load"
        " --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-save-process-group"
        " --ckpt-fully-parallel-load-process-group --async-strategy --use-persistent-ckpt-worker"
        " --async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm"
        " --ckpt-assume-constant-structure --no-ckpt-load-validate-sharding-integrity"
        " --dist-ckpt-strictness --dist-ckpt-workers --dist-ckpt-format --use-dist-ckpt"
        " --verify-integrity",
    ),
    Apart(
        what="How ranks meet, and over which wire",
        reason="collectives give the same sums whatever carries them",
        names="--distributed-backend --distributed-timeout-minutes"
        " --distributed-timeout-seconds-after-init --pipeline-model-parallel-comm-backend"
        " --local-rank --lazy-mpu-init --nccl-communicator-config-path"
        " --disable-gloo-process-groups --use-sharp --sharp-enabled-group"
        " --high-priority-stream-groups --use-nccl-ub --disable-symmetric-registration"
        " --use-ring-exchange-p2p --no-overlap-p2p-communication"
        " --overlap-p2p-communication-warmup-flush --symmetric-ar-type batch_p2p_comm"
        " batch_p2p_sync variable_seq_lengths deallocate_pipeline_outputs",
    ),
    Apart(
        what="Random states",
        reason="which generator draws; dropout's masks are a row of their own",
        names="--te-rng-tracker --inference-rng-tracker --data-parallel-random-init"
        " --no-initialization use_te_rng_tracker",
    ),
    Apart(
        what="Memory and the interpreter",
        reason="when memory is given back changes no number",
        names="--empty-unused-memory-level --manual-gc --manual-gc-interval --no-manual-gc-eval",
    ),
    Apart(
        what="How the run is described",
        reason="what the description sets is checked where it was set: in the arguments, the config"
        " and the layer spec",
        names="--help --spec --yaml-cfg --enable-experimental transformer transformer_layer_spec"
        " pre_wrap_hooks post_wrap_hooks finalize_model_grads_func",
    ),
)

_KERNELS = (
    Apart(
        what="Which kernel computes what a rank was handed",
        reason="a kernel works on the tensors of one rank: whole heads of its tokens, or one"
        " token's features",
        names="--attention-backend --flash-attention-version --use-flash-attn"
        " --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion"
        " --no-bias-dropout-fusion bias_activation_fusion --no-rope-fusion fused_single_qkv_rope"
        " --no-persist-layer-norm persist_layer_norm memory_efficient_layer_norm"
        " --disable-jit-fuser --use-te-activation-func --disable-bf16-reduced-precision-matmul"
        " enable_autocast autocast_dtype num_microbatches_with_partial_activation_checkpoints",
    ),
    Apart(
        what="The inside of experts",
        reason="experts are Megatron's own and compute token by token what the router sent them",
        names="--moe-grouped-gemm --moe-single-grouped-weight --moe-single-grouped-bias"
        " --use-grouped-gemm-for-shared-expert --moe-shared-expert-glu-interleave-size"
        " --moe-mlp-glu-interleave-size --moe-permute-fusion --moe-router-fusion",
    ),
    Apart(
        what="What ends in an error in stock Megatron 0.19.2",
        reason="no run gets to a layer with them",
        names="--init-method-xavier-uniform --no-pad-vocab-size",
    ),
    Apart(
        what="Routing at random, for benchmarks",
        reason="no number of stock's is there to be equal to",
        names="--moe-router-force-load-balancing --moe-router-force-biased",
    ),
)

APART = (*_DATA, *_OPTIMIZER, *_RUN, *_KERNELS, *OTHERS)

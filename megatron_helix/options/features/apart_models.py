"""What cannot interact because it is of other models, or of engines that no training run starts."""

from megatron_helix.options.features.rows import Apart

OTHERS = (
    Apart(
        what="Megatron's inference engines",
        reason="no training run starts them, and `helix generate` has an engine of its own",
        names="--flash-decode --nccl-all-reduce-for-prefill --inference-fuse-tp-communication"
        " --inference-disable-triton-nvls-kernels --inference-grouped-gemm-backend"
        " --inference-moe-disable-fused-quant-kernels --inference-moe-token-dispatcher-type"
        " --moe-pad-experts-for-cuda-graph-inference --mlp-chunks-for-prefill"
        " --inference-cuda-graph-scope --inference-batch-times-seqlen-threshold --max-tokens-to-oom"
        " --use-legacy-static-engine --inference-max-requests --inference-max-seq-length"
        " --inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb"
        " --inference-dynamic-batching-paused-buffer-size-gb"
        " --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-block-size"
        " --inference-dynamic-batching-max-requests --inference-dynamic-batching-max-tokens"
        " --inference-dynamic-batching-num-cuda-graphs"
        " --inference-dynamic-batching-track-paused-request-events"
        " --inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs"
        " --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens"
        " --inference-dynamic-batching-unified-memory-level --enable-chunked-prefill"
        " --num-speculative-tokens --inference-dynamic-batching-prefix-caching"
        " --inference-dynamic-batching-prefix-caching-eviction-policy"
        " --inference-dynamic-batching-prefix-caching-coordinator-policy"
        " --inference-dynamic-batching-prefix-caching-routing-alpha"
        " --inference-dynamic-batching-prefix-caching-mamba-gb"
        " --inference-dynamic-batching-cuda-graph-mixed-prefill-count"
        " --inference-dynamic-batching-cuda-graph-sizing-distribution"
        " --inference-dynamic-batching-sampling-backend --use-same-sampling-seed-across-dp-ranks"
        " --inference-dynamic-batching-async-sched-mode --inference-dynamic-batching-logprobs-mode"
        " --inference-logging-step-interval --inference-text-gen-server-logging"
        " --inference-wandb-logging --inference-coordinator-port"
        " --inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus"
        " --inference-shards inference_sampling_seed",
    ),
    Apart(
        what="BERT, T5, retrieval, vision, ONNX, ModelOpt",
        reason="GPT's entry point reads none of them",
        names="--encoder-num-layers --decoder-num-layers --encoder-seq-length --decoder-seq-length"
        " --mask-prob --short-seq-prob --onnx-safe --bert-no-binary-head --output-bert-embeddings"
        " --bert-embedder-type --ict-head-size --biencoder-projection-dim"
        " --biencoder-shared-query-context-model --ict-load --bert-load --titles-data-path"
        " --query-in-block-prob --use-one-sent-docs --evidence-data-path"
        " --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path"
        " --embedding-path --indexer-batch-size --indexer-log-interval --num-classes --img-h"
        " --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction"
        " --no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type"
        " --vision-backbone-type --swin-backbone-type --mask-type --mask-factor --iter-per-epoch"
        " --dino-local-img-size --dino-local-crops-number --dino-head-hidden-size"
        " --dino-bottleneck-size --dino-freeze-last-layer --dino-norm-last-layer"
        " --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs"
        " restore_modelopt_state use_arbitrary_attention_mask",
    ),
    Apart(
        what="Names of the past",
        reason="Megatron refuses them, or makes of them another flag, which has its row",
        names="--batch-size --model-parallel-size --checkpoint-activations --rope-type"
        " --use-rotary-position-embeddings --no-position-embedding --use-mcore-models",
    ),
)

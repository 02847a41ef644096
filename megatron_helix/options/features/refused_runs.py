"""What is refused of the run around the model: other owners of the weights, dumps of memory."""

from megatron_helix.options.features.rows import Refused

_SHARDS = "it shards the weights that helix shards already"
_NOT_RUN = "it has not been run beside helix"
_WITH_INPUTS = "gathered weights have their gradients computed with the input's"
_MEMORY = "they hold what lay in a rank's memory, not canonical rows"
_TORCH_DIST = "only torch_dist describes tiles by their canonical rows"

_OWNERS = (
    Refused(
        feature="Generalized tensor parallelism",
        asks="--tensor-parallel-num-weight-shards",
        field="gtp_weight_remat_size",
        off=1,
        reason=_SHARDS,
        parts="gtp_weight_remat_size",
    ),
    Refused(
        feature="Generalized tensor parallelism of experts",
        asks="--expert-tensor-parallel-num-weight-shards",
        field="expert_gtp_weight_remat_size",
        off=1,
        reason=_NOT_RUN,
        parts="expert_gtp_weight_remat_size",
    ),
    Refused(
        feature="Megatron FSDP",
        asks="--use-megatron-fsdp",
        field="use_megatron_fsdp",
        reason=_SHARDS,
        parts="--data-parallel-sharding-strategy --outer-dp-sharding-strategy"
        " --fsdp-double-buffer --suggested-communication-unit-size"
        " --enable-full-sharding-in-hsdp --fsdp-manual-registration"
        " --create-all-gather-group --fsdp-db-use-persist-buf-on-alloc-fail"
        " --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype"
        " --megatron-fsdp-grad-comm-dtype --megatron-fsdp-enable-fine-grained-param-gather"
        " --megatron-fsdp-max-pool-double-buffer --no-strict-fsdp-dtensor-load"
        " --init-model-with-meta-device",
    ),
    Refused(
        feature="Torch FSDP2",
        asks="--use-torch-fsdp2",
        field="use_torch_fsdp2",
        reason=_SHARDS,
        parts="--torch-fsdp2-no-reshard-after-forward",
    ),
    Refused(
        feature="Muon, SOAP",
        asks="--optimizer",
        field="optimizer",
        values=("muon", "dist_muon", "adaptive_muon", "soap"),
        reason="they work on whole weight matrices, of which a rank holds a tile",
        parts="--muon-momentum --muon-no-split-qkv --muon-nesterov --muon-scale-mode"
        " --muon-fp32-matmul-prec --muon-coefficient-type --muon-num-ns-steps --muon-tp-mode"
        " --muon-extra-scale-factor --muon-scalar-optimizer",
    ),
)

_OVERLAP = (
    Refused(
        feature="TransformerEngine's tensor-parallel overlap",
        asks="--tp-comm-overlap",
        field="tp_comm_overlap",
        reason="its buffers are laid out for all-gathers over the whole tensor-parallel group",
        parts="--tp-comm-overlap-cfg --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad"
        " --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad"
        " --no-tp-comm-split-ag --no-tp-comm-split-rs --tp-comm-bootstrap-backend tp_comm_atomic_ag"
        " tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1",
    ),
    Refused(
        feature="Delayed weight gradients",
        asks="--delay-wgrad-compute",
        field="delay_wgrad_compute",
        reason=_WITH_INPUTS,
    ),
    Refused(
        feature="Deferred weight gradients of the LM head",
        asks="--defer-embedding-wgrad-compute",
        field="defer_embedding_wgrad_compute",
        reason=_WITH_INPUTS,
        parts="--wgrad-deferral-limit",
    ),
    Refused(
        feature="Overlapped expert-parallel communication",
        asks="--overlap-moe-expert-parallel-comm",
        field="overlap_moe_expert_parallel_comm",
        reason="it calls the parts of a layer one by one, past the layer that plans the exchange",
        parts="--ep-overlap-early-attn-memory-release --high-priority-a2a-comm-stream",
    ),
    Refused(
        feature="Expert gradients beside the dispatch",
        asks="--overlap-dispatch-backward-with-experts-wgrad",
        field="overlap_dispatch_backward_with_experts_wgrad",
        reason=_NOT_RUN,
    ),
    Refused(
        feature="TransformerEngine's operation fuser",
        asks="--use-transformer-engine-op-fuser",
        field="use_transformer_engine_op_fuser",
        reason="it replaces the MLP's linears, which gather their weights",
    ),
    Refused(
        feature="Linears made for inference",
        asks="--transformer-impl",
        field="transformer_impl",
        values=("inference_optimized",),
        reason="their fused collectives span the whole tensor-parallel group",
        parts="use_inference_optimized_layers",
    ),
    Refused(
        feature="Parameter gathering beside the optimizer's step",
        asks="--overlap-param-gather-with-optimizer-step",
        field="overlap_param_gather_with_optimizer_step",
        reason=_NOT_RUN,
    ),
)

_MEMORY_SAVERS = (
    Refused(
        feature="Activations offloaded to the CPU",
        asks="--cpu-offloading-num-layers",
        field="cpu_offloading_num_layers",
        reason=_NOT_RUN,
        parts="--cpu-offloading-retain-pinned-cpu-buffers cpu_offloading_activations"
        " cpu_offloading_weights cpu_offloading_double_buffering _cpu_offloading_context"
        " cpu_offloading",
    ),
    Refused(
        feature="Fine-grained activation offloading",
        asks="--fine-grained-activation-offloading",
        field="fine_grained_activation_offloading",
        reason=_NOT_RUN,
        parts="--offload-modules --min-offloaded-tensor-size --delay-offload-until-cuda-graph"
        " --delta-offload-bytes-across-pp-ranks --activation-offload-fraction"
        " --fine-grained-offloading-max-inflight-offloads",
    ),
    Refused(
        feature="Paged stash of expert activations",
        asks="--moe-paged-stash",
        field="moe_paged_stash",
        reason=_NOT_RUN,
        parts="--moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda"
        " --moe-paged-stash-buffer-size-factor-cpu",
    ),
)

_EXPERTS = (
    Refused(
        feature="DeepEP, HybridEP and NCCL EP dispatchers",
        asks="--moe-token-dispatcher-type",
        field="moe_token_dispatcher_type",
        values=("flex",),
        reason=_NOT_RUN,
        parts="--moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep"
        " --moe-hybridep-pad-uneven-dispatch-inputs --moe-flex-dispatcher-num-sms"
        " --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute"
        " --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing"
        " --moe-ncclep-static-shape --moe-ncclep-zero-copy",
    ),
    Refused(
        feature="DeepEP (old flag)",
        asks="--moe-enable-deepep",
        field="moe_enable_deepep",
        reason=_NOT_RUN,
    ),
    Refused(
        feature="Capacity of a rank's experts together",
        asks="--moe-expert-rank-capacity-factor",
        field="moe_expert_rank_capacity_factor",
        reason=_NOT_RUN,
    ),
    Refused(
        feature="Replayed routing",
        asks="--moe-enable-routing-replay",
        field="moe_enable_routing_replay",
        reason="a recorded routing is in stock's order of tokens",
    ),
    Refused(
        feature="Residual stream in fp32 beside half-precision weights",
        asks="--fp32-residual-connection",
        field="fp32_residual_connection",
        reason="it takes TransformerEngine's norms, and has not been run beside helix",
    ),
    Refused(
        feature="Projections to smaller experts",
        asks="--moe-latent-size",
        field="moe_latent_size",
        reason="it takes TransformerEngine, and has not been run beside helix",
    ),
    Refused(
        feature="A dense checkpoint made into a MoE one",
        asks="--moe-use-upcycling",
        field="moe_use_upcycling",
        reason=_NOT_RUN,
        parts="--moe-upcycling-granularity",
    ),
    Refused(
        feature="Reinforcement learning",
        asks="--perform-rl-step",
        field="perform_rl_step",
        reason="its rollouts are made by Megatron's inference engine, whose paged cache holds whole"
        " heads (`megatron_helix.rollout` makes them in a loop of one's own)",
        parts="--rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size --rl-generation-lag"
        " --rl-submission-granularity --rl-consumption-granularity --grpo-iterations"
        " --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta --grpo-entropy-term-weight"
        " --grpo-filter-groups-with-same-reward --langrl-env-config --rl-default-temperature"
        " --rl-default-top-p --rl-default-top-k --rl-offload-optimizer-during-inference"
        " --rl-kv-cache-management-mode --rl-persist-cuda-graphs --rl-partial-rollouts"
        " --rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef"
        " --rl-inference-tensor-model-parallel-size --rl-inference-pipeline-model-parallel-size"
        " --rl-inference-expert-model-parallel-size"
        " --rl-inference-expert-tensor-model-parallel-size"
        " --rl-inference-model-unified-memory-level --rl-offload-inference-model-weights-when-idle"
        " --refit-method --rl-verify-model-weights-swap --rl-skip-bos-token --rl-profile"
        " --rl-profile-dir --rl-inference-parsers",
    ),
)

_FILES = (
    Refused(
        feature="Checkpoints in other formats",
        asks="--ckpt-format",
        field="ckpt_format",
        values=("torch", "torch_dcp", "fsdp_dtensor"),
        reason=_TORCH_DIST,
    ),
    Refused(
        feature="Checkpoints converted to another format",
        asks="--ckpt-convert-format",
        field="ckpt_convert_format",
        reason=_TORCH_DIST,
        parts="--ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format",
    ),
    Refused(
        feature="Checkpoints of the format before Megatron-Core 0.14",
        asks="--dist-ckpt-save-pre-mcore-014",
        field="dist_ckpt_save_pre_mcore_014",
        reason="its optimizer state is in the order of a rank's memory",
    ),
    Refused(
        feature="Checkpoints in memory or on a node's own disk",
        asks="--non-persistent-ckpt-type",
        field="non_persistent_ckpt_type",
        values=("local", "in_memory"),
        reason=_MEMORY,
        parts="--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication"
        " --replication-jump --replication-factor",
    ),
    Refused(
        feature="The parallel sizes of a checkpoint",
        asks="--use-mp-args-from-checkpoint-args",
        field="use_mp_args_from_checkpoint_args",
        reason="they would take the place of m and n",
    ),
    *(
        Refused(
            feature=f"Dumps of {what}",
            asks=f"--save-{flag}-interval",
            field=f"save_{flag.replace('-', '_')}_interval",
            reason=_MEMORY,
        )
        for what, flag in (
            ("parameters", "params"),
            ("activations", "activations"),
            ("tokens by expert", "tokens-per-expert"),
            ("weight gradients", "wgrads"),
            ("input gradients", "dgrads"),
        )
    ),
    Refused(
        feature="A fake process group",
        asks="--fake-process-group",
        field="fake_process_group",
        reason="it moves nothing, and an exchange is what it moves",
    ),
)

RUNS = (*_OWNERS, *_OVERLAP, *_MEMORY_SAVERS, *_EXPERTS, *_FILES)

"""What of a checkpoint's arguments belongs to the run that saved it, not to the model.

Everything else that Megatron reads when it builds a model or its tokenizer is the model's
(:mod:`megatron_helix.inference.saved_model`), what a later Megatron adds included. Each group says
why another run may differ in it and still compute the same, up to rounding.
"""

# The layout is asked for anew. A vocabulary is padded to a multiple of the tensor-parallel size;
# which dispatcher takes tokens to their experts, and by what library, follows from the machine.
PARALLELISM = (
    *("tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size"),
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("pipeline_model_parallel_layout", "pipeline_model_parallel_comm_backend"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("microbatch_group_size_per_vp_stage", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush"),
    *("use_ring_exchange_p2p", "variable_seq_lengths", "mtp_standalone"),
    *("sequence_parallel", "context_parallel_size", "hierarchical_context_parallel_sizes"),
    *("max_seqlen_per_dp_cp_rank", "hybrid_context_parallel", "cp_comm_type"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"),
    *("tp_comm_overlap", "tp_comm_overlap_cfg", "tp_comm_bootstrap_backend"),
    *("tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs"),
    *("tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_split_rs"),
    *("symmetric_ar_type", "nccl_all_reduce_for_prefill", "padded_vocab_size"),
    *("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "moe_enable_deepep"),
    *("moe_flex_dispatcher_num_sms", "moe_deepep_num_sms", "moe_hybridep_num_sms"),
    *("moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute"),
    *("moe_hybridep_num_sms_preprocessing", "moe_hybridep_pad_uneven_dispatch_inputs"),
    *("moe_permute_fusion_into_hybridep", "moe_ncclep_static_shape", "moe_ncclep_zero_copy"),
    *("moe_expert_rank_capacity_factor", "high_priority_a2a_comm_stream"),
    *("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm"),
)

# The same arithmetic by another kernel: the device at hand decides. Not among these:
# ``bias_gelu_fusion``, whose GELU is another function.
KERNELS = (
    *("transformer_impl", "attention_backend", "flash_attention_version", "flash_decode"),
    *("masked_softmax_fusion", "bias_dropout_fusion", "bias_swiglu_fusion", "apply_rope_fusion"),
    *("no_persist_layer_norm", "fused_residual_rmsnorm", "gradient_accumulation_fusion"),
    *("use_fused_weighted_squared_relu", "use_transformer_engine_op_fuser"),
    *("use_te_activation_func", "mla_down_proj_fusion", "cache_mla_latents"),
    *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "dsa_kernel_backend"),
    *("moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"),
    *("use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert"),
    *("moe_permute_fusion", "moe_router_fusion", "moe_pad_expert_input_to_capacity"),
    "moe_pad_experts_for_cuda_graph_inference",
    *("inference_fuse_tp_communication", "inference_disable_triton_nvls_kernels"),
    *("inference_grouped_gemm_backend", "inference_moe_disable_fused_quant_kernels"),
    *("inference_moe_token_dispatcher_type", "mlp_chunks_for_prefill", "mlp_chunks_for_training"),
    *("use_mamba_mem_eff_path", "batch_invariant_mode", "deterministic_mode"),
    *("disable_bf16_reduced_precision_matmul", "clone_scatter_output_in_embedding"),
    *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_modules"),
    *("cuda_graph_warmup_steps", "inference_cuda_graph_scope"),
    *("use_kitchen_attention", "kitchen_attention_backend"),
)

# FP8 and FP4 are of the products, not of the weights: those are stored in ``params_dtype``. Who
# serves such a model must say in what (:mod:`megatron_helix.inference.unserved`).
QUANTIZATION = (
    *("fp8", "fp8_recipe", "fp8_param_gather", "fp8_quantizer_factory", "fp8_margin"),
    *("fp8_interval", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
    *("fp8_output_proj", "fp4", "fp4_recipe", "fp4_param_gather", "fp4_quantizer_factory"),
    *("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    *("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"),
    "te_precision_config_file",
)

# Losses, noise and bookkeeping of training. Heads that predict further tokens (multi-token
# prediction) stand behind the last layer: the next token's logits do not depend on them.
TRAINING = (
    *("hidden_dropout", "attention_dropout", "moe_input_jitter_eps", "test_mode"),
    *("mtp_num_layers", "mtp_loss_scaling_factor", "mtp_use_repeated_layer", "mtp_detach_heads"),
    *("mtp_hybrid_override_pattern", "calculate_per_token_loss", "fp16_lm_cross_entropy"),
    *("moe_z_loss_coeff", "moe_per_layer_logging"),
    *("moe_enable_routing_replay", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss"),
    *("qk_clip", "qk_clip_alpha", "qk_clip_threshold", "log_max_attention_logit"),
    *("barrier_with_L1_time", "config_logger_dir", "seed", "inference_rng_tracker", "sft"),
)

# Where a model's weights come from before training: here from the checkpoint.
INITIALISATION = (
    *("perform_initialization", "use_cpu_initialization", "init_model_with_meta_device"),
    "init_method_xavier_uniform",
)

# Of the backward pass, which there is not.
BACKWARD = (
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("distribute_saved_activations", "moe_layer_recompute", "delay_wgrad_compute"),
    *("overlap_dispatch_backward_with_experts_wgrad", "ep_overlap_early_attn_memory_release"),
    *("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    *("cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_retain_pinned_cpu_buffers"),
    *("fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
    *("delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks"),
    *("activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
    *("moe_paged_stash", "moe_paged_stash_page_size"),
    *("moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu"),
)

RUN_FIELDS = frozenset(
    (*PARALLELISM, *KERNELS, *QUANTIZATION, *TRAINING, *INITIALISATION, *BACKWARD)
)

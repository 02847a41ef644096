"""CUDA graphs, which :mod:`megatron_helix.options.graphs` lets through or refuses."""

from megatron_helix.options.features.rows import Works

# By the value of --cuda-graph-impl the exchanges that it has captured with the numbers of the same
# run without graphs: losses and gradient norms of 8 steps, equal to the last bit, of two processes
# on one H200 (benchmarks/results/one_h200_exactness.json). Not timed, nor run on two GPUs. What is
# not here is refused.
CAPTURED: dict[str, tuple[str, ...]] = {
    "local": ("activations",),
    "transformer_engine": ("activations",),
    "full_iteration": ("activations", "weights"),
}
BY_LAYER = ("local", "transformer_engine")
# What was seen there of others.
FAILED: dict[tuple[str, str], str] = {
    (impl, "weights"): "whose capture fails with cudaErrorStreamCaptureInvalidated"
    for impl in BY_LAYER
}


def captured() -> str:
    """The table in words."""
    kept = {impl: exchanges for impl, exchanges in CAPTURED.items() if exchanges}
    return "; ".join(
        f"{impl}: {' or '.join(exchanges)}"
        + (" with --helix-split batch" if impl in BY_LAYER else "")
        for impl, exchanges in kept.items()
    )


GRAPHS = (
    Works(
        feature="CUDA graphs",
        names="--cuda-graph-impl --cuda-graph-warmup-steps --cuda-graph-scope --cuda-graph-modules"
        " cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph",
        test="tests/options/test_graphs.py::test_a_step_is_a_replay_of_the_step_before",
        note=f"{captured()}. Dense models in half precision, whole layers; without packed rows,"
        " recomputation, pipeline and context parallelism. Equal to the last bit, by two processes"
        " on one GPU; not timed",
    ),
)

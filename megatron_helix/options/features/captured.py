"""CUDA graphs, which :mod:`megatron_helix.options.graphs` lets through or refuses."""

from megatron_helix.options.features.rows import Works
from megatron_helix.options.graphs import captured

GRAPHS = (
    Works(
        feature="CUDA graphs",
        names="--cuda-graph-impl --cuda-graph-warmup-steps --cuda-graph-scope --cuda-graph-modules"
        " cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph",
        test="tests/options/test_graphs.py::test_a_step_is_a_replay_of_the_step_before",
        note=f"{captured()}. Dense models in half precision, whole layers; without packed rows,"
        " recomputation, pipeline and context parallelism. Equal to the last bit by two processes on"
        " one GPU; not timed",
    ),
)

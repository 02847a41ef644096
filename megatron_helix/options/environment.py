"""What a run's flags need of its environment.

Before Blackwell, kernels of one process go to the GPU through CUDA_DEVICE_MAX_CONNECTIONS hardware
queues. Tensor and context parallelism want one, so that a collective starts in the order in which
it was issued, before the GEMM beside it. Layouts that gather weights ahead want several: with one
queue Megatron FSDP and torch FSDP2 refuse to start (megatron/training/arguments.py), and GTP's
gathers stand in the way of its GEMMs.
"""

from collections.abc import Mapping, Sequence

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_GATHER_AHEAD = (
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--tensor-parallel-num-weight-shards",
)


def needed(argv: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The variables to set for a run.

    Args:
        argv: its flags; words that are none do no harm.
        given: the environment it would have. What it says stays, but for the single queue that
            Megatron's guides tell everyone to ask for, where the run cannot do with one.
    """
    if any(word.partition("=")[0] in _GATHER_AHEAD for word in argv):
        return {CONNECTIONS: "8"} if given.get(CONNECTIONS, "1") == "1" else {}
    return {} if CONNECTIONS in given else {CONNECTIONS: "1"}

"""What starts the ranks, as an experiment file says it."""

from typing import Literal

from pydantic import PositiveInt

from megatron_helix.run_config.files import Config


class LauncherConfig(Config):
    """What starts the ranks.

    Attributes:
        kind: ``fork`` forks them on this machine's CPUs, ``torchrun`` starts them on this machine,
            ``slurm`` starts one torchrun on each node of an allocation, which share the folder of
            the results.
        nodes: machines; several under Slurm only.
    """

    kind: Literal["fork", "torchrun", "slurm"] = "fork"
    nodes: PositiveInt = 1

"""Two-level attention partitioning for Megatron-LM: n head groups x m head-dimension segments."""

__version__ = "0.1.0"

"""The m x n partition: its arithmetic, its process groups, its tiles in checkpoints."""

"""Every place where Megatron or torch is touched or stood in for."""

"""What a model, a batch and a layout are, in Megatron's terms, and how a file says so."""

"""Prefill and decode on a KV cache that is cut m x n."""

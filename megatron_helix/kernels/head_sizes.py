"""Head dimensions that core attentions have kernels for. Without torch: flags are checked by it."""

CHANNELS = {
    "split": range(8, 257, 8),  # torch's fused kernels
    "ffpa": range(320, 513),  # ffpa-attn 0.2.4's for sm_90
}


def said(core: str) -> str:
    """``CHANNELS`` of one, in words."""
    sizes = CHANNELS[core]
    if sizes.step > 1:
        return f"multiples of {sizes.step} up to {sizes[-1]}"
    return f"{sizes.start} to {sizes[-1]}"

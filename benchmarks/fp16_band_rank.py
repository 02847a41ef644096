"""A rank of ``fp16_band.py`` whose ``--helix-core-attention prefix`` is Megatron's own unfused one.

    torchrun ... -m fp16_band_rank GATE FLAGS ...

is otherwise as ``gated.py``.
"""

import sys
from pathlib import Path

import gated

from megatron_helix import pretrain_gpt


def main() -> None:
    """Run one rank."""
    flags = pretrain_gpt.prepare_rank(sys.argv[2:])
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_helix.layers import layer_spec

    layer_spec.CORE_ATTENTIONS["prefix"] = DotProductAttention
    gated.wait(Path(sys.argv[1]))
    pretrain_gpt.train(flags)


if __name__ == "__main__":
    main()

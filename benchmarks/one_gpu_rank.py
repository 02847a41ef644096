"""One rank of ``one_gpu_parity.py``: Megatron's loop, and a line a step with all digits of it.

    torchrun ... -m one_gpu_rank GATE LINES FLAGS ...

Imports, says so in a file beside GATE and waits until GATE exists. Both ranks are on the first GPU:
NCCL takes them for those of two hosts, and connects them by sockets.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LINGER_S = 1.5  # what the other rank may still read of this one's sockets


def main() -> None:
    """Run one rank; it ends without waiting for communicators, which captured graphs may hold."""
    gate, lines, *flags = sys.argv[1:]
    rank = os.environ["RANK"]
    os.environ.update(NCCL_HOSTID=f"rank{rank}", LOCAL_RANK="0")
    import gated
    import torch

    from megatron_helix import pretrain_gpt

    pretrain_gpt.make_ready("cuda")
    ready(Path(gate), int(rank)).touch()
    gated.wait(Path(gate))
    train(pretrain_gpt.prepare_rank(flags, script=False), Path(lines))
    torch.cuda.synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(LINGER_S)
    os._exit(0)


def ready(gate: Path, rank: int) -> Path:
    """The file by which a rank says that it waits at the gate."""
    return gate.with_name(f"{gate.name}.{rank}")


def train(argv: Sequence[str], lines: Path) -> None:
    """Train on this rank; rank 0 writes what each step said.

    Args:
        argv: completed flags.
        lines: file that gets a JSON line a step: ``loss``, ``norm`` (None without one),
            ``skipped``, and whether attention was gap by gap (``by_gaps``).
    """
    from megatron_helix import pretrain_gpt
    from megatron_helix.upstream import patches

    def observed(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        losses, skipped, *_, norm, _zeros, _logit = result
        said = {"loss": float(losses["lm loss"]), "norm": None if norm is None else float(norm)}
        if os.environ["RANK"] == "0":
            with lines.open("a") as file:
                row = {**said, "skipped": bool(skipped), "by_gaps": attends_by_gaps(args[2])}
                file.write(json.dumps(row) + "\n")
        return result

    patches.observe_train_step(observed)
    pretrain_gpt.train(argv)


def attends_by_gaps(model: Sequence[Any]) -> bool:
    """Whether attention of the last forward pass was gap by gap."""
    modules = (module for chunk in model for module in chunk.modules())
    return any(getattr(module, "by_gaps", False) for module in modules)


if __name__ == "__main__":
    main()

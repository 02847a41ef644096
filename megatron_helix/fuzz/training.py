"""What the ranks of a session run: Megatron's own training, and what is seen of it."""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_helix import corpus, pretrain_gpt
from megatron_helix.upstream import patches

# What Megatron or a run imports only when it first needs it.
LATER = (
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "megatron.core.tokenizers.text.models",
    "megatron_helix.recording.record",
)


@dataclass(frozen=True)
class Step:
    """What a rank sees of an optimizer step.

    Attributes:
        loss: on the ranks of the last pipeline stage, else None.
        grad_norm: before it is clipped.
        params_norm: of all weights after the update; None where ranks wait for some of them.
    """

    loss: float | None
    grad_norm: float
    params_norm: float | None


def train(argv: Sequence[str]) -> list[Step]:
    """One rank of ``pretrain_gpt.train``: its steps."""
    from megatron.training import get_args
    from megatron.training.utils import calc_params_l2_norm

    steps = []

    def observed(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        losses, *_, grad_norm, _zeros, _logit = result
        loss = losses.get("lm loss")
        whole = not get_args().overlap_param_gather
        steps.append(
            Step(
                loss=None if loss is None else float(loss),
                grad_norm=float(grad_norm),
                params_norm=float(calc_params_l2_norm(args[2])) if whole else None,
            )
        )
        return result

    patches.observe_train_step(observed)
    pretrain_gpt.train(argv)
    return steps


def ready(folder: Path) -> list[str]:
    """Import once what every rank needs, and write the text that all cases learn from.

    Returns:
        The flags that name the text.
    """
    dice = random.Random(0)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(200):  # short ones: their ends fall into most sequences
        letters = dice.choices(f"{string.ascii_lowercase}    ", k=dice.randrange(8, 80))
        (texts / f"{number:03d}.txt").write_text("".join(letters))
    pretrain_gpt.prepare(["--helix-device", "cpu"], 1)
    patches.use_compiled_dataset_helpers()
    import torch

    for name in LATER:
        import_module(name)
    torch.set_num_threads(1)  # a forked rank cannot use its parent's thread pool
    corpus.build([texts], folder / "corpus")
    return ["--data-path", str(folder / "corpus")]

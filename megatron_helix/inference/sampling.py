"""How the next token is drawn from its logits; every rank draws the same."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_helix.basics.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the user asked for.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0 among all.
        top_p: draw among the likeliest that together have this probability; 0 among all.
        seed: of the generator, which all ranks share.

    Raises:
        UserError: for values out of range, and for top_k and top_p together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature: must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top-k: must be 0 (off) or more, got {self.top_k}")
        if not 0.0 <= self.top_p <= 1.0:
            raise UserError(f"--top-p: must be between 0 (off) and 1, got {self.top_p}")
        if self.top_k and self.top_p:
            raise UserError(
                f"--top-p: goes without --top-k, got {self.top_p} and {self.top_k}; leave one away"
            )
        if not self.temperature and (self.top_k or self.top_p):
            raise UserError(
                "--temperature: must be above 0 to draw with --top-k or --top-p, got 0; set it, or"
                " leave them away"
            )

    def sampler(self, device: torch.device | int, vocabulary: int) -> "Sampler":
        """Ready to draw, on ``device``, among the first ``vocabulary`` tokens."""
        return Sampler(self, torch.Generator(device).manual_seed(self.seed), vocabulary)


class Sampler:
    """Draws tokens, one after the other, from a generator of its own.

    Args:
        sampling: what the user asked for.
        generator: on the device of the logits.
        vocabulary: tokens that are drawn among: the first ones, what pads a vocabulary is not.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator, vocabulary: int):
        self.sampling, self.generator, self.vocabulary = sampling, generator, vocabulary

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, V]``, padded or not -> tokens ``[b]``."""
        logits = logits[:, : self.vocabulary].float()
        if not self.sampling.temperature:
            return logits.argmax(dim=-1)
        from megatron.core.inference.sampling import TorchSampling  # slow

        return TorchSampling.sample_from_logits(logits, **self._filter, generator=self.generator)

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of ``tokens`` ``[b]`` under the distribution that they are drawn from, in fp32.

        Where the likeliest is taken that is one of a single token; it is then the model's, over the
        tokens that may be drawn.
        """
        possible = logits[:, : self.vocabulary].float()
        if self.sampling.temperature:
            from megatron.core.inference.sampling import TorchSampling  # slow

            possible = TorchSampling.filter_logits(possible, **self._filter)
        return log_probs(possible, tokens)

    @property
    def _filter(self) -> dict[str, Any]:
        """Megatron's arguments of what may be drawn, and how likely."""
        asked = self.sampling
        return {
            "temperature": asked.temperature,
            "top_k": min(asked.top_k, self.vocabulary),
            "top_p": asked.top_p,
        }


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of ``tokens`` ``[b]`` under ``logits`` ``[b, V]``, in fp32: ``[b]``."""
    of_all = torch.log_softmax(logits.float(), dim=-1)
    return of_all.gather(1, tokens.to(logits.device).unsqueeze(1)).squeeze(1)

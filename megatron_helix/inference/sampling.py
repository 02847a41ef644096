"""How the next token is drawn from its logits; every rank draws the same."""

from dataclasses import dataclass

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
    """Draws tokens, one after the other, from a generator of its own."""

    def __init__(self, sampling: Sampling, generator: torch.Generator, vocabulary: int):
        self.sampling, self.generator, self.vocabulary = sampling, generator, vocabulary

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, V]``, padded or not -> tokens ``[b]``."""
        logits = logits[:, : self.vocabulary].float()
        if not self.sampling.temperature:
            return logits.argmax(dim=-1)
        from megatron.core.inference.sampling import TorchSampling  # slow

        return TorchSampling.sample_from_logits(
            logits,
            self.sampling.temperature,
            min(self.sampling.top_k, self.vocabulary),
            self.sampling.top_p,
            generator=self.generator,
        )

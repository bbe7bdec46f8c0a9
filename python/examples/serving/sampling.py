"""From logits to tokens: greedy, and top-p with a temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen. A temperature of 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"a temperature of {self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, and has to be above 0 and at most 1")


def sample(logits: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """One token for each row of `[n, vocab]`, on the device."""
    chosen = logits.argmax(-1)
    drawn = [at for at, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        device = logits.device
        temperature = torch.tensor([[samplings[at].temperature] for at in drawn], device=device)
        top_p = torch.tensor([[samplings[at].top_p] for at in drawn], device=device)
        shares, order = (logits[drawn].float() / temperature).softmax(-1).sort(-1, descending=True)
        # The most likely ones, up to the one with which their shares reach top_p.
        shares = shares.where(shares.cumsum(-1) - shares < top_p, 0.0)
        chosen[drawn] = order.gather(-1, shares.multinomial(1)).squeeze(-1)
    return chosen

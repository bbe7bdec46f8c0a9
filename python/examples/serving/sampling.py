"""From logits to tokens: greedy, and top-p with a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    warm = [(at, sampling) for at, sampling in enumerate(samplings) if sampling.temperature > 0]
    if warm:
        device = logits.device

        def column(numbers: list[Any]) -> torch.Tensor:
            # From memory that is not pinned a copy would wait for the device.
            made = torch.tensor(numbers, pin_memory=device.type == "cuda")
            return made.to(device, non_blocking=True)

        drawn = column([at for at, _ in warm])
        temperature = column([[sampling.temperature] for _, sampling in warm])
        top_p = column([[sampling.top_p] for _, sampling in warm])
        shares, order = (logits[drawn].float() / temperature).softmax(-1).sort(-1, descending=True)
        # The most likely ones, up to the one with which their shares reach top_p.
        shares = shares.where(shares.cumsum(-1) - shares < top_p, 0.0)
        chosen[drawn] = order.gather(-1, shares.multinomial(1)).squeeze(-1)
    return chosen

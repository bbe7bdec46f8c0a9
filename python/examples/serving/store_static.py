"""The static KV cache: every slot at full length, allocated in advance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from store import Shape, Slots

if TYPE_CHECKING:
    from choices import Choice


class Static(Slots):
    """As many slots of the longest request's length as the budget holds, one of them spare."""

    name = "static"
    prefill = decode = "fa3"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.stride = shape.longest
        slots = min(shape.budget // (shape.token_bytes * shape.longest), shape.most + 1)
        if slots < 2:
            raise ValueError(
                f"a budget of {shape.budget} bytes holds {slots} slots of {shape.longest} tokens, and two are needed; "
                "raise it, or serve shorter requests"
            )
        of = (shape.layers, 2, slots, shape.longest, shape.kv_heads, shape.head_dim)
        # Kernels read whole tiles: what was never written has to be numbers.
        self.pool = torch.zeros(of, dtype=shape.dtype, device=shape.device)
        self.slot_keys = [layer[0] for layer in self.pool]
        self.slot_values = [layer[1] for layer in self.pool]
        self.keys = [keys.flatten(0, 1) for keys in self.slot_keys]
        self.values = [values.flatten(0, 1) for values in self.slot_values]
        self.spare_row = (slots - 1) * self.stride
        self.free = list(range(slots - 2, -1, -1))

    def admits(self, prompts: Sequence[int]) -> int:
        return min(len(prompts), len(self.free))

    def begin(self, tokens: int) -> int:
        return self.free.pop()

    def grow(self, places: numpy.ndarray, totals: numpy.ndarray) -> bool:
        return not len(totals) or int(totals.max()) <= self.stride

    def end(self, place: int) -> None:
        self.free.append(place)

    def held(self) -> int:
        return self.pool.numel() * self.pool.itemsize


def make(shape: Shape, choice: Choice) -> Static:
    return Static(shape)

"""The paged KV cache: one pool, allocated in advance, and for each request a list of its pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from store import Pages, Shape

if TYPE_CHECKING:
    from choices import Choice


class Paged(Pages):
    """A free list of pages, taken from its end: what was given back last is used first, as servers do."""

    name = "paged"
    prefill = decode = "flashinfer"

    def __init__(self, shape: Shape, *, page_tokens: int = 16) -> None:
        self.shape, self.page_tokens = shape, page_tokens
        count = shape.budget // (shape.token_bytes * page_tokens)
        if count < 2:
            raise ValueError(
                f"a budget of {shape.budget} bytes is less than two pages of {page_tokens} tokens; raise it"
            )
        of = (shape.layers, 2, count, page_tokens, shape.kv_heads, shape.head_dim)
        self.pool = torch.empty(of, dtype=shape.dtype, device=shape.device)
        self.page_keys = [layer[0] for layer in self.pool]
        self.page_values = [layer[1] for layer in self.pool]
        self.keys = [keys.flatten(0, 1) for keys in self.page_keys]
        self.values = [values.flatten(0, 1) for values in self.page_values]
        self.spare_page = 0
        self.spare_row = 0
        self.free = list(range(count - 1, 0, -1))
        self.tables = numpy.zeros((shape.most, self.needed(shape.longest)), numpy.int32)
        # How many pages each place has, and the places that nobody has.
        self.counts = numpy.zeros(shape.most, numpy.int64)
        self.places = list(range(shape.most - 1, -1, -1))

    def admits(self, prompts: Sequence[int]) -> int:
        left = len(self.free)
        for count, prompt in enumerate(prompts):
            left -= self.needed(prompt)
            if left < 0 or count == len(self.places):
                return count
        return len(prompts)

    def begin(self, tokens: int) -> int:
        return self.places.pop()

    def grow(self, places: numpy.ndarray, totals: numpy.ndarray) -> bool:
        more = self.needed(totals) - self.counts[places]
        some = numpy.flatnonzero(more > 0)
        if int(more[some].sum()) > len(self.free):
            return False
        for at in some.tolist():
            place, count = int(places[at]), int(more[at])
            first = int(self.counts[place])
            self.tables[place, first : first + count] = self.free[-count:]
            del self.free[-count:]
            self.counts[place] += count
        return True

    def end(self, place: int) -> None:
        self.free.extend(self.tables[place, : self.counts[place]].tolist())
        self.counts[place] = 0
        self.places.append(place)

    def rows(self, places: numpy.ndarray | int, positions: numpy.ndarray) -> numpy.ndarray:
        page, within = numpy.divmod(positions, self.page_tokens)
        return self.tables[places, page].astype(numpy.int64) * self.page_tokens + within

    def scatter(self) -> None:
        random.Random(0).shuffle(self.free)

    def held(self) -> int:
        return self.pool.numel() * self.pool.itemsize


def make(shape: Shape, choice: Choice) -> Paged:
    return Paged(shape, page_tokens=choice.page_tokens)

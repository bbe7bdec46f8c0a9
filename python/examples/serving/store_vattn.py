"""The KV cache in virtual memory: contiguous, backed on demand, and readable as pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from store import Pages, Shape, Slots

import vattn
import vattn.torch

if TYPE_CHECKING:
    from choices import Choice

ENTRY = numpy.dtype([("index", "u4"), ("cache", "u4"), ("generation", "u8"), ("tokens", "u8")])
"""What `KvCache.step` takes of each request, in a buffer."""


class Vattn(Slots, Pages):
    """Slots of a `vattn.KvCache`. Prefill takes the kernel for contiguous tensors, decode the one for pages: their
    size is free to choose, since nothing is allocated by them."""

    name = "vattn"
    prefill, decode = "fa3", "flashinfer"

    def __init__(
        self,
        shape: Shape,
        *,
        layout: str | int = "sliced",
        page_tokens: int = 16,
        kernel: str | None = None,
        driver: vattn.Driver | None = None,
    ) -> None:
        self.shape = shape
        self.page_tokens = page_tokens
        driver = driver or vattn.torch.driver_for(shape.device)
        model = vattn.Geometry(
            [vattn.Layers(shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)],
            dtype=str(shape.dtype).removeprefix("torch."),
        )
        self.cache = vattn.KvCache(
            model,
            driver,
            budget=shape.budget,
            max_tokens=shape.longest,
            max_slots=shape.most,
            spare_slot=True,
            page_tokens=page_tokens,
            tile_tokens=model.tile_tokens(kernel) if kernel else 1,
            layout=layout,
        )
        plan = self.cache.layout
        self.stride = plan.stride_tokens
        self.spare_row = plan.spare_slot * self.stride
        self.spare_page = plan.spare_slot * plan.pages_per_slot
        # The identity table: a slot's pages lie one behind another.
        of = shape.most, plan.pages_per_slot
        self.tables = numpy.arange(of[0] * of[1], dtype=numpy.int32).reshape(of)

        def views(part: str, of: Callable[..., vattn.View]) -> list[torch.Tensor]:
            return [vattn.torch.tensor(of(layer, part)) for layer in range(shape.layers)]

        self.slot_keys, self.slot_values = views("key", self.cache.raw), views("value", self.cache.raw)
        self.page_keys, self.page_values = views("key", self.cache.pages), views("value", self.cache.pages)
        self.keys = [rows[0] for rows in views("key", self.cache.rows)]
        self.values = [rows[0] for rows in views("value", self.cache.rows)]
        #: By place, the request that has it.
        self.slots: dict[int, vattn.Slot] = {}
        self.entries = numpy.zeros(shape.most, ENTRY)

    def admits(self, prompts: Sequence[int]) -> int:
        return self.cache.admits(prompts)

    def begin(self, tokens: int) -> int:
        slot = self.cache.acquire(tokens)
        self.slots[slot.index] = slot
        self.entries[slot.index] = (slot.index, slot.cache, slot.generation, 0)
        return slot.index

    def grow(self, places: numpy.ndarray, totals: numpy.ndarray) -> bool:
        entries = self.entries[places]
        entries["tokens"] = totals
        try:
            self.cache.step(entries)
        except (vattn.OutOfBudget, vattn.OutOfDeviceMemory):
            return False
        return True

    def end(self, place: int) -> None:
        self.cache.retire(self.slots.pop(place), vattn.IDLE)

    def held(self) -> int:
        return self.cache.bytes().held

    def close(self) -> None:
        # A tensor over the cache's memory keeps its addresses.
        for tensors in (
            self.slot_keys,
            self.slot_values,
            self.page_keys,
            self.page_values,
            self.keys,
            self.values,
        ):
            tensors.clear()
        self.cache.close()


def make(shape: Shape, choice: Choice) -> Vattn:
    # FlashAttention-3 reads whole tiles where it decodes over the batch; the others read nothing past a length. What it
    # reads there is multiplied by zero: right where memory holds numbers, which is not looked after here.
    kernel = "fa3-decode" if choice.decode == "fa3" else None
    return Vattn(shape, layout=choice.layout, page_tokens=choice.page_tokens, kernel=kernel)

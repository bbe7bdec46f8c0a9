"""The KV cache in virtual memory: contiguous, backed on demand, and readable as pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from store import Pages, Shape, Slots

import vattn
import vattn.torch


class Vattn(Slots, Pages):
    """Slots of a `vattn.KvCache`. Prefill takes the kernel for contiguous tensors, decode the one for pages."""

    name = "vattn"
    prefill, decode = "fa3", "flashinfer"

    def __init__(
        self,
        shape: Shape,
        *,
        layout: str | int = "sliced",
        page_tokens: int = 16,
        tile_tokens: int = 1,
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
            tile_tokens=tile_tokens,
            layout=layout,
        )
        plan = self.cache.layout
        self.stride, self.per_slot = plan.stride_tokens, plan.pages_per_slot
        self.spare_row = plan.spare_slot * self.stride
        self.spare_page = plan.spare_slot * self.per_slot

        def views(part: str, of) -> list[torch.Tensor]:
            return [vattn.torch.tensor(of(layer, part)) for layer in range(shape.layers)]

        self.slot_keys, self.slot_values = views("key", self.cache.raw), views("value", self.cache.raw)
        self.page_keys, self.page_values = views("key", self.cache.pages), views("value", self.cache.pages)
        self.keys = [rows[0] for rows in views("key", self.cache.rows)]
        self.values = [rows[0] for rows in views("value", self.cache.rows)]

    def admits(self, prompts: Sequence[int]) -> int:
        return self.cache.admits(prompts)

    def begin(self, tokens: int) -> vattn.Slot:
        return self.cache.acquire(tokens, stream=self.stream())

    def fits(self, wanted: Sequence[tuple[vattn.Slot, int]]) -> list[bool]:
        return self.cache.fits(wanted)

    def grow(self, wanted: Sequence[tuple[vattn.Slot, int]]) -> None:
        self.cache.step(wanted)

    def end(self, handle: vattn.Slot) -> None:
        self.cache.retire(handle, self.stream() or vattn.IDLE)

    def stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.shape.device) if self.shape.device.type == "cuda" else None

    def slot(self, handle: vattn.Slot) -> int:
        return handle.index

    def pages(self, handle: vattn.Slot, tokens: int) -> numpy.ndarray:
        first = handle.index * self.per_slot
        return numpy.arange(first, first + -(-tokens // self.page_tokens), dtype=numpy.int32)

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

"""What the engine asks of a KV cache, whichever it is.

A fourth cache is one more file with a [`Store`]: it says who may start, backs what a step needs, and where each
token lies. How attention is computed over it is a choice of kernels (kernels.py), one for prefill and one for
decode.

A request's *place* is a small number: a slot, or a row of a table of pages. Places, positions and lengths come as
NumPy arrays, one entry a request, because a step asks about all requests at once.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch

Count = TypeVar("Count", int, numpy.ndarray)


@dataclass(frozen=True)
class Shape:
    """What a store has to keep, and with how much memory."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    budget: int
    """Bytes of device memory."""
    longest: int
    """The most tokens of a request, prompt and answer."""
    most: int
    """The most requests at a time."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class Store(ABC):
    """Where keys and values are kept."""

    name: str
    shape: Shape
    prefill: str
    """The name of the kernels that prefill runs best with over it."""
    decode: str

    keys: list[torch.Tensor]
    """For each layer the keys as one row of tokens, `[row, kv_heads, dim]`."""
    values: list[torch.Tensor]
    page_tokens: int | None = None
    """Tokens of a page, where there are pages."""
    spare_row: int
    """A row that is nobody's: padded entries of a batch write there."""

    @abstractmethod
    def admits(self, prompts: Sequence[int]) -> int:
        """How many of these requests, in order, could start now with all of their prompt."""

    @abstractmethod
    def begin(self, tokens: int) -> int:
        """A place for a request that will soon hold so many tokens."""

    @abstractmethod
    def grow(self, places: numpy.ndarray, totals: numpy.ndarray) -> bool:
        """Each of these now holds so many tokens in all; or memory does not suffice, and nothing has changed."""

    @abstractmethod
    def end(self, place: int) -> None:
        """The request is done, or starts anew later. The device is done with its memory."""

    @abstractmethod
    def rows(self, places: numpy.ndarray | int, positions: numpy.ndarray) -> numpy.ndarray:
        """The rows of the tokens at these positions, of one place or of as many as there are positions."""

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps a layer's keys and values, `[n, kv_heads, dim]`, at these rows."""
        self.keys[layer].index_copy_(0, rows, keys)
        self.values[layer].index_copy_(0, rows, values)

    @abstractmethod
    def held(self) -> int:
        """Bytes of device memory that it has now."""

    def scatter(self) -> None:
        """Has free memory in no order, as after a while of use, where that means something."""

    def close(self) -> None:
        """Gives everything back."""


def forget(device: torch.device) -> None:
    """After the last reference to a store: what PyTorch kept of its memory is the device's again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Slots(Store):
    """A store in which a place is a slot: a range of rows of its own, one slot's behind another's."""

    slot_keys: list[torch.Tensor]
    """For each layer the keys by slot, `[slot, token, kv_heads, dim]`."""
    slot_values: list[torch.Tensor]
    stride: int
    """Rows from one slot to the next."""

    def rows(self, places: numpy.ndarray | int, positions: numpy.ndarray) -> numpy.ndarray:
        return places * self.stride + positions


class Pages(Store):
    """A store whose rows can be read as pages of equal size through a table."""

    page_tokens: int
    page_keys: list[torch.Tensor]
    """For each layer the keys by page, `[page, token of the page, kv_heads, dim]`."""
    page_values: list[torch.Tensor]
    spare_page: int
    tables: numpy.ndarray
    """For each place its pages in order, int32 `[place, page]`."""

    def needed(self, tokens: Count) -> Count:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_tokens)

    def listed(self, places: numpy.ndarray, totals: numpy.ndarray, width: int) -> tuple[torch.Tensor, ...]:
        """The pages of so many tokens of each place, as FlashInfer takes them: where each one's begin, the pages
        of all one after another, and how many tokens the last page of each has. Entries up to `width` read one
        token of the spare page."""
        count = len(places)
        pages = self.needed(totals)
        begins = numpy.empty(width + 1, numpy.int32)
        begins[0] = 0
        numpy.cumsum(pages, out=begins[1 : count + 1])
        begins[count + 1 :] = begins[count] + numpy.arange(1, width - count + 1)
        lists = [self.tables[place, :some] for place, some in zip(places.tolist(), pages.tolist())]
        if width > count:
            lists.append(numpy.full(width - count, self.spare_page, numpy.int32))
        last = numpy.ones(width, numpy.int32)
        last[:count] = (totals - 1) % self.page_tokens + 1
        return tuple(map(torch.from_numpy, (begins, numpy.concatenate(lists), last)))

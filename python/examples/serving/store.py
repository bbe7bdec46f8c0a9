"""What the engine asks of a KV cache, whichever it is.

A fourth cache is one more file with a [`Store`]: it says who may start, backs what a step needs, and where each
token lies. How attention is computed over it is a choice of kernels (kernels.py), one for prefill and one for
decode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

Handle = Any
"""A request's place in a store: a slot, or a list of pages."""


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
    spare_row: int
    """A row that is nobody's: padded entries of a batch write there."""

    @abstractmethod
    def admits(self, prompts: Sequence[int]) -> int:
        """How many of these requests, in order, could start now with all of their prompt."""

    @abstractmethod
    def begin(self, tokens: int) -> Handle:
        """A place for a request that will soon hold so many tokens."""

    @abstractmethod
    def fits(self, wanted: Sequence[tuple[Handle, int]]) -> list[bool]:
        """Which of these could hold so many tokens in all, each with those before it that could."""

    @abstractmethod
    def grow(self, wanted: Sequence[tuple[Handle, int]]) -> None:
        """Each of these now holds so many tokens in all."""

    @abstractmethod
    def end(self, handle: Handle) -> None:
        """The request is done, or starts anew later. Kernels of the current stream may still read its memory."""

    @abstractmethod
    def rows(self, handle: Handle, start: int, stop: int) -> numpy.ndarray:
        """The rows of its tokens from `start` to `stop`, int64."""

    @abstractmethod
    def held(self) -> int:
        """Bytes of device memory that it has now."""

    def close(self) -> None:
        """Gives everything back."""


class Slots(Store):
    """A store in which every request has a slot: a range of rows of its own, one behind another."""

    slot_keys: list[torch.Tensor]
    """For each layer the keys by slot, `[slot, token, kv_heads, dim]`."""
    slot_values: list[torch.Tensor]
    stride: int
    """Rows from one slot to the next."""

    @abstractmethod
    def slot(self, handle: Handle) -> int:
        """Its index in the first dimension."""

    def rows(self, handle: Handle, start: int, stop: int) -> numpy.ndarray:
        first = self.slot(handle) * self.stride
        return numpy.arange(first + start, first + stop, dtype=numpy.int64)


class Pages(Store):
    """A store whose rows can be read as pages of equal size through a table."""

    page_tokens: int
    page_keys: list[torch.Tensor]
    """For each layer the keys by page, `[page, token of the page, kv_heads, dim]`."""
    page_values: list[torch.Tensor]
    spare_page: int

    @abstractmethod
    def pages(self, handle: Handle, tokens: int) -> numpy.ndarray:
        """The pages of its first so many tokens, in order, int32."""

"""The paged KV cache: one pool, allocated in advance, and for each request a list of its pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from store import Pages, Shape


class Request:
    """The pages of a request, in a buffer that grows by doubling."""

    def __init__(self) -> None:
        self.table = numpy.empty(16, dtype=numpy.int32)
        self.count = 0

    def add(self, pages: Sequence[int]) -> None:
        """Appends pages."""
        end = self.count + len(pages)
        if end > len(self.table):
            self.table = numpy.resize(self.table, max(end, 2 * len(self.table)))
        self.table[self.count : end] = pages
        self.count = end


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

    def needed(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_tokens)

    def admits(self, prompts: Sequence[int]) -> int:
        left = len(self.free)
        for count, prompt in enumerate(prompts):
            left -= self.needed(prompt)
            if left < 0:
                return count
        return len(prompts)

    def begin(self, tokens: int) -> Request:
        return Request()

    def fits(self, wanted: Sequence[tuple[Request, int]]) -> list[bool]:
        left, answers = len(self.free), []
        for request, tokens in wanted:
            more = self.needed(tokens) - request.count
            answers.append(more <= left)
            left -= more if answers[-1] else 0
        return answers

    def grow(self, wanted: Sequence[tuple[Request, int]]) -> None:
        for request, tokens in wanted:
            more = self.needed(tokens) - request.count
            if more > len(self.free):
                raise MemoryError(
                    f"{more} pages are needed and {len(self.free)} are free; end a request first"
                )
            if more > 0:
                request.add([self.free.pop() for _ in range(more)])

    def end(self, handle: Request) -> None:
        self.free.extend(reversed(handle.table[: handle.count].tolist()))
        handle.count = 0

    def rows(self, handle: Request, start: int, stop: int) -> numpy.ndarray:
        at = numpy.arange(start, stop, dtype=numpy.int64)
        return (
            handle.table[at // self.page_tokens].astype(numpy.int64) * self.page_tokens
            + at % self.page_tokens
        )

    def pages(self, handle: Request, tokens: int) -> numpy.ndarray:
        return handle.table[: self.needed(tokens)]

    def held(self) -> int:
        return self.pool.numel() * self.pool.itemsize

"""Forward passes from and to memory that stays where it is, so that CUDA graphs can replay them.

[`Batch`] is one new token of each of some requests: all of it is one graph. [`Mixed`] is parts of prompts with such
tokens behind them: attention, whose work differs from step to step, is launched kernel by kernel, and what lies between
one layer's attention and the next one's is a graph, one for each of the widths to which a pass is padded. Without them
the host takes longer to launch a short prompt's pass than the device to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import numpy
import torch
from kernels import DECODE
from model import Model
from store import Store

T = TypeVar("T")
Pool = tuple[int, int]

WIDTHS = [1, 2, 4, 8, *range(16, 1009, 16)]
"""How many requests the batches take. FlashInfer's scratch memory suffices for these."""
STEP = 128
"""Mixed passes are padded to a multiple of so many tokens: matrix products compute them in such tiles anyhow."""
WIDEST = 2048
"""Up to so many tokens. Wider passes keep a device busy for longer than a host takes to launch them."""


def wide(count: int) -> int:
    """The width of the smallest batch for so many requests."""
    return next(width for width in WIDTHS if width >= count)


def padded(count: int) -> int:
    """To how many tokens a mixed pass of so many is padded."""
    return -(-count // STEP) * STEP


@cache
def side_stream() -> torch.cuda.Stream:
    """A stream for what is captured, and what runs once before."""
    return torch.cuda.Stream()


@contextmanager
def aside() -> Iterator[None]:
    """On the side stream, after what was launched before, and before what is launched later."""
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):
        yield
    torch.cuda.current_stream().wait_stream(side_stream())


def captured(run: Callable[[], T], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what is launched, and what that returned. It runs once before, so that nothing is compiled while it is
    captured."""
    with aside():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()
    return graph, output


class Pass:
    """A forward pass over the tokens in its buffers."""

    def __init__(self, model: Model, store: Store, most: int, beyond: int = 0) -> None:
        """Of up to `most` tokens. `beyond` is up to how many rows behind them kernels may read and write."""
        self.model, self.store = model, store
        config, device = model.config, model.device
        self.on_card = device.type == "cuda"
        self.host = torch.zeros(3 * most, dtype=torch.int64, pin_memory=self.on_card)
        self.buffer = torch.zeros(3 * most, dtype=torch.int64, device=device)
        #: What a layer's attention is asked and what it answers, `[token, heads, dim]`.
        self.query, self.attended = torch.zeros(
            2, most + beyond, config.heads, config.head_dim, dtype=model.dtype, device=device
        )

    def stretches(self, width: int) -> Iterator[int]:
        """Computes so many tokens, and stops for each layer's attention, whose number it says: what is asked is in
        `query` then, keys and values are in the store, and `attended` has to have the answer when it goes on. At the
        end `normed` has the last layer's output, `[token, hidden]`."""
        tokens, positions, rows = self.buffer[: 3 * width].view(3, width)
        query, attended = self.query[:width], self.attended[:width]
        hidden, normed, angles = self.model.enter(tokens, positions)
        for layer in range(self.model.config.layers):
            key, value = self.model.project(layer, normed, angles, query)
            self.store.write(layer, rows, key, value)
            yield layer
            hidden, normed = self.model.leave(layer, hidden, attended)
        self.normed = normed


class Mixed(Pass):
    """Any tokens of any requests, up to so many. Whose attention it is only who calls it knows."""

    def __init__(self, model: Model, store: Store, most: int, pool: Pool | None) -> None:
        """`pool` is the graphs' memory; without, there are none."""
        super().__init__(model, store, padded(most), beyond=WIDTHS[-1] - WIDTHS[-2])
        self.pool = pool
        #: By width: a graph for each stretch, and what `normed` is after the last.
        self.graphs: dict[int, tuple[list[torch.cuda.CUDAGraph], torch.Tensor]] = {}

    def width(self, count: int) -> int:
        """How many tokens are computed for so many."""
        return padded(count) if self.replayed(count) else count

    def replayed(self, count: int) -> bool:
        """Whether it is from graphs."""
        return self.pool is not None and padded(count) <= WIDEST

    def fill(self, tokens: numpy.ndarray) -> None:
        """These are its tokens: `[3, count]`, of each the number, the position, and the row of its keys and values.
        Those of the pass before have been read."""
        count = tokens.shape[1]
        width = self.width(count)
        if self.replayed(count) and width not in self.graphs:
            self.capture(width)
        given = self.host[: 3 * width]
        lines = given.view(3, width).numpy()
        lines[:, :count] = tokens
        lines[:, count:] = [[0], [0], [self.store.spare_row]]
        self.buffer[: 3 * width].copy_(given, non_blocking=True)

    def forward(self, count: int, attend: Callable[[int], None]) -> torch.Tensor:
        """The last layer's output of so many tokens, `[count or more, hidden]`. `attend` computes a layer's attention,
        from `query` to `attended`."""
        if not self.replayed(count):
            for layer in self.stretches(count):
                attend(layer)
            return self.normed
        graphs, normed = self.graphs[self.width(count)]
        for layer, graph in enumerate(graphs):
            graph.replay()
            if layer < self.model.config.layers:
                attend(layer)
        return normed

    def prepare(self, most: int) -> None:
        """Captures all that passes of up to so many tokens need, the widest first: later ones then share its memory."""
        for width in reversed(range(STEP, min(padded(most), WIDEST) + 1, STEP)):
            self.capture(width)

    def capture(self, width: int) -> None:
        """Captures a pass of so many tokens, all of them padding meanwhile."""
        padding = self.buffer[: 3 * width].view(3, width)
        padding[:2] = 0
        padding[2] = self.store.spare_row
        with aside():
            # Once before, so that nothing is compiled while it is recorded.
            for _ in self.stretches(width):
                pass
        self.graphs[width] = self.recorded(width), self.normed

    def recorded(self, width: int) -> list[torch.cuda.CUDAGraph]:
        """A graph of each stretch."""
        torch.cuda.synchronize()
        graphs, stretches, on = [], self.stretches(width), True
        with aside():
            while on:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self.pool)
                on = next(stretches, None) is not None
                graph.capture_end()
                graphs.append(graph)
        return graphs


class Batch(Pass):
    """Decoding for a fixed number of requests."""

    def __init__(self, model: Model, store: Store, decode: str, width: int) -> None:
        super().__init__(model, store, width)
        self.width = width
        self.kernel = DECODE[decode](store, model.config.heads, width)
        self.graph: torch.cuda.CUDAGraph | None = None
        #: What the device has to reach before the host's side of a plan may be written anew.
        self.copied = torch.cuda.Event() if self.on_card else None

    def plan(self, places: numpy.ndarray, kept: numpy.ndarray) -> None:
        """The next pass is for the requests at these places, each of which has so many tokens before its new one. The
        device may still be in the pass before."""
        if self.copied:
            self.copied.synchronize()
        count, width = len(places), self.width
        _, positions, rows = self.host.view(3, width).numpy()
        positions[:count], positions[count:] = kept, 0
        rows[:count], rows[count:] = self.store.rows(places, kept), self.store.spare_row
        self.buffer[width:].copy_(self.host[width:], non_blocking=True)
        self.kernel.plan(places, kept + 1)
        if self.copied:
            self.copied.record()

    def fill(self, tokens: list[int]) -> None:
        """These are their new tokens. Those of the pass before have been chosen, so its own were read long ago."""
        line = self.host[: self.width].numpy()
        line[: len(tokens)], line[len(tokens) :] = tokens, 0
        self.buffer[: self.width].copy_(self.host[: self.width], non_blocking=True)

    @property
    def ready(self) -> bool:
        """Whether it need not be captured any more."""
        return self.graph is not None or not self.on_card

    def forward(self) -> torch.Tensor:
        """Logits `[width, vocab]`."""
        if self.graph is None:
            return self.compute()
        self.graph.replay()
        return self.logits

    def compute(self) -> torch.Tensor:
        """The same, launched kernel by kernel."""
        for layer in self.stretches(self.width):
            self.kernel.run(layer, self.query, self.attended)
        return self.model.logits(self.normed)

    def capture(self, pool: Pool | None) -> None:
        """Records a pass into a graph. All entries are padding meanwhile."""
        none = numpy.empty(0, numpy.int64)
        self.plan(none, none)
        self.fill([])
        self.graph, self.logits = captured(self.compute, pool)

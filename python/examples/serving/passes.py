"""Forward passes from and to memory that stays where it is, so that CUDA graphs can replay them.

[`Batch`] is one new token of each of some requests: all of it is one graph. [`Mixed`] is parts of prompts with such
tokens behind them: attention, whose work differs from step to step, is launched kernel by kernel, and what lies between
one layer's attention and the next one's, a *stretch*, is a graph. Without those the host takes longer to launch a short
prompt's pass than the device to compute it.

What is captured runs once before, so that nothing is compiled while it is captured.
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
"""Of how many requests there are batches. FlashInfer's scratch memory suffices for these."""
BEYOND = WIDTHS[-1] - WIDTHS[-2] - 1
"""How many entries a batch is wider than its requests, at the most."""
TILE = 128
"""Mixed passes that are replayed are padded to a multiple of so many tokens, as matrix products compute them anyhow."""
MOST_REPLAYED = 2048
"""Mixed passes of more tokens are not: they keep a device busy for longer than a host takes to launch them."""


def wide(count: int) -> int:
    """The width of the smallest batch for so many requests."""
    return next(width for width in WIDTHS if width >= count)


@cache
def side_stream() -> torch.cuda.Stream:
    """The stream of everything that is captured. Graphs share a pool's memory if they were captured on one stream."""
    return torch.cuda.Stream()


@contextmanager
def aside() -> Iterator[None]:
    """On the side stream, after what was launched before, and before what is launched later."""
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):
        yield
    torch.cuda.current_stream().wait_stream(side_stream())


def recorded(run: Callable[[], T], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what is launched, and what that returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side_stream()):
        output = run()
    return graph, output


def captured(run: Callable[[], T], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """The same, after it has run once."""
    with aside():
        run()
    return recorded(run, pool)


class Room:
    """What passes of up to so many tokens leave between their stretches. Those that share one never run at the same
    time."""

    def __init__(self, model: Model, most: int) -> None:
        config = model.config
        #: What a layer's attention is asked and what it answers, `[token, heads, dim]`.
        self.query, self.attended = torch.zeros(
            2, most, config.heads, config.head_dim, dtype=model.dtype, device=model.device
        )
        #: The last layer's output, `[token, hidden]`.
        self.normed = torch.zeros(most, config.hidden, dtype=model.dtype, device=model.device)


class Pass:
    """A forward pass over the tokens in its buffers."""

    def __init__(self, model: Model, store: Store, most: int, room: Room) -> None:
        """Of up to `most` tokens."""
        self.model, self.store, self.room = model, store, room
        self.on_card = model.device.type == "cuda"
        #: Of each token its number, its position, and the row of its keys and values: `[3, width]` for each width.
        self.host = torch.zeros(3 * most, dtype=torch.int64, pin_memory=self.on_card)
        self.buffer = torch.zeros(3 * most, dtype=torch.int64, device=model.device)

    def stretches(self, width: int) -> Iterator[int]:
        """Computes so many tokens, and stops for each layer's attention, whose number it says: what is asked is in the
        room's `query` then, keys and values are in the store, and `attended` has to have the answer when it goes on. At
        the end `normed` is there."""
        tokens, positions, rows = self.buffer[: 3 * width].view(3, width)
        query, attended = self.room.query[:width], self.room.attended[:width]
        hidden, normed, angles = self.model.enter(tokens, positions)
        for layer in range(self.model.config.layers):
            key, value = self.model.project(layer, normed, angles, query)
            self.store.write(layer, rows, key, value)
            yield layer
            hidden, normed = self.model.leave(layer, hidden, attended)
        self.room.normed[:width] = normed


class Mixed(Pass):
    """Any tokens of any requests, up to so many. Whose attention it is only who calls it knows."""

    def __init__(self, model: Model, store: Store, most: int, room: Room, pool: Pool | None) -> None:
        """`pool` is the graphs' memory; without, there are none. The room has to have `needed(most)` tokens."""
        super().__init__(model, store, self.tiled(most), room)
        self.most, self.pool = most, pool
        #: For each width one of each stretch.
        self.graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}

    @staticmethod
    def tiled(count: int) -> int:
        """In whole tiles."""
        return -(-count // TILE) * TILE

    @classmethod
    def needed(cls, most: int) -> int:
        """The room for a pass of so many tokens, of which the last may be a batch's."""
        return cls.tiled(most) + BEYOND

    def replayed(self, count: int) -> bool:
        """Whether a pass of so many tokens is from graphs."""
        return self.pool is not None and self.tiled(count) <= MOST_REPLAYED

    def run(self, lines: numpy.ndarray, asked: list[int], attend: Callable[[int], None]) -> torch.Tensor:
        """Logits `[asked, vocab]` of the tokens that are asked for. `lines` are all tokens' numbers, positions, and rows
        of keys and values, `[3, count]`; `attend` computes a layer's attention, from the room's `query` to its
        `attended`. Those of the pass before have been read."""
        count = lines.shape[1]
        replayed = self.replayed(count)
        width = self.tiled(count) if replayed else count
        if replayed and width not in self.graphs:
            self.capture(width)
        self.fill(lines, width)
        rows = torch.tensor(asked, dtype=torch.int64, pin_memory=self.on_card)
        rows = rows.to(self.model.device, non_blocking=True)
        if replayed:
            for layer, graph in enumerate(self.graphs[width]):
                graph.replay()
                if layer < self.model.config.layers:
                    attend(layer)
        else:
            for layer in self.stretches(count):
                attend(layer)
        return self.model.logits(self.room.normed[rows])

    def fill(self, lines: numpy.ndarray, width: int) -> None:
        """These are the tokens of a pass, and padding behind them."""
        given, count = self.host[: 3 * width], lines.shape[1]
        padded = given.view(3, width).numpy()
        padded[:, :count] = lines
        padded[:, count:] = [[0], [0], [self.store.spare_row]]
        self.buffer[: 3 * width].copy_(given, non_blocking=True)

    def prepare(self) -> None:
        """Captures all that may be needed, the widest first: later ones then share its memory."""
        for width in reversed(range(TILE, self.tiled(self.most) + 1, TILE)):
            if self.replayed(width) and width not in self.graphs:
                self.capture(width)

    def capture(self, width: int) -> None:
        """Captures a pass of so many tokens, all of them padding meanwhile. The device is done with it when this returns:
        to be recorded waits for that."""
        self.fill(numpy.empty((3, 0), numpy.int64), width)
        with aside():
            for _ in self.stretches(width):
                pass
        stretches = self.stretches(width)
        self.graphs[width] = [
            recorded(lambda: next(stretches, None), self.pool)[0] for _ in range(self.model.config.layers + 1)
        ]


class Batch(Pass):
    """Decoding for a fixed number of requests."""

    def __init__(self, model: Model, store: Store, decode: str, width: int, room: Room) -> None:
        super().__init__(model, store, width, room)
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

    def run(self) -> torch.Tensor:
        """Logits `[width, vocab]`."""
        if self.graph is None:
            return self.compute()
        self.graph.replay()
        return self.logits

    def compute(self) -> torch.Tensor:
        """The same, launched kernel by kernel."""
        query, attended = self.room.query[: self.width], self.room.attended[: self.width]
        for layer in self.stretches(self.width):
            self.kernel.run(layer, query, attended)
        return self.model.logits(self.room.normed[: self.width])

    def capture(self, pool: Pool | None) -> None:
        """Records a pass into a graph. All entries are padding meanwhile."""
        none = numpy.empty(0, numpy.int64)
        self.plan(none, none)
        self.fill([])
        self.graph, self.logits = captured(self.compute, pool)

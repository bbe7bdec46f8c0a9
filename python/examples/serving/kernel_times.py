"""What attention costs over each cache, kernel by kernel, before anything is served: what a run is held against.

    python kernel_times.py kernel_times.json

Each kernel is timed through the same store, plan and run as the engine's, with eight layers in a CUDA graph so that
the host costs nothing. Pages lie shuffled, as in a server that has run for a while.

[`Times`] reads the file: what a kernel would take for other shapes, between those that were measured, and so what
attention came to in all of a run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from bench import read, write
from choices import Choice
from kernels import DECODE, PREFILL, Decode, Prefill, names
from model import Config
from passes import captured
from store import Shape, Store, forget

LAYERS = 8
"""How many of the layers are timed."""
NEW = (64, 128, 512, 2048, 8192)
TOTAL = (64, 128, 512, 2048, 8192, 32768, 131072)
"""New tokens of a request, and how many it has in all: where they are as many, the start of a prompt."""
DECODES = ((1, 4096), (1, 98304), (4, 32768), (16, 8192), (64, 2048), (128, 1024))
"""Requests, and tokens of each."""
PAGES = (16, 64, 256)

CHOICES = [
    *(f"vattn:{pages}" for pages in PAGES),
    "vattn:16:fa3:fa3",
    *(f"paged:{pages}" for pages in PAGES),
    *(f"paged:{pages}:flashinfer-fa2" for pages in PAGES),
    "static",
]


def timed(kernel: Prefill | Decode, query: torch.Tensor) -> float:
    """Microseconds a layer, from a graph: the median of some repeats."""

    out = torch.empty_like(query)

    def run() -> None:
        for layer in range(LAYERS):
            kernel.run(layer, query, out)

    graph, _ = captured(run)
    found: list[float] = []
    graph.replay()
    while len(found) < 5 or len(found) < 25 and sum(found) < 20_000:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end))
    return statistics.median(found) / LAYERS


def fill(store: Store, places: Sequence[int], lengths: Sequence[int], layers: int) -> numpy.ndarray:
    """Requests of so many random tokens, in so many of the layers, at these places."""
    taken, shape = numpy.array(places, numpy.int64), store.shape
    if not store.grow(taken, numpy.array(lengths, numpy.int64)):
        raise MemoryError(f"{len(places)} requests of {sum(lengths)} tokens do not fit; raise the budget")
    for place, length in zip(places, lengths):
        rows = torch.from_numpy(store.rows(place, numpy.arange(length))).to(shape.device)
        of = (2, length, shape.kv_heads, shape.head_dim)
        for layer in range(layers):
            store.write(layer, rows, *torch.randn(of, dtype=shape.dtype, device=shape.device))
    return taken


def prefill_times(store: Store, choice: Choice, heads: int) -> list[dict[str, Any]]:
    """Microseconds a layer, for one request."""
    kernel = PREFILL[names(store, choice.prefill)[0]](store, heads)
    shape = store.shape
    place = store.begin(max(TOTAL))
    places = fill(store, [place], [max(TOTAL)], LAYERS)
    found = []
    for new, total in itertools.product(NEW, TOTAL):
        if new > total:
            continue
        kernel.plan(places, numpy.array([new]), numpy.array([total]))
        query = torch.randn(new, heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
        taken = timed(kernel, query)
        found.append({"new": new, "total": total, "us": taken})
    store.end(place)
    return found


def decode_times(store: Store, choice: Choice, heads: int) -> list[dict[str, Any]]:
    """Microseconds a layer, for so many requests of a length each."""
    shape, found = store.shape, []
    for count, tokens in DECODES:
        begun = [store.begin(tokens) for _ in range(count)]
        places = fill(store, begun, [tokens] * count, LAYERS)
        kernel = DECODE[names(store, decode=choice.decode)[1]](store, heads, count)
        kernel.plan(places, numpy.full(count, tokens))
        query = torch.randn(count, heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
        taken = timed(kernel, query)
        found.append({"requests": count, "tokens": tokens, "us": taken})
        for place in begun:
            store.end(place)
        torch.cuda.synchronize()
    return found


def measured(text: str, config: Config, budget: int, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All shapes with one choice, over a store of its own."""
    choice = Choice.read(text)
    # A static slot is as long as the longest: in the same memory it has room for fewer, and none for most decodes.
    few = choice.store == "static"
    shape = Shape(
        config.layers,
        config.kv_heads,
        config.head_dim,
        torch.bfloat16,
        torch.device("cuda"),
        budget * (3 if few else 1),
        max(TOTAL) + 64,
        max(count for count, _ in DECODES),
    )
    store = choice.open(shape)
    store.scatter()
    prefill, decode = names(store, choice.prefill, choice.decode)
    entry: dict[str, Any] = {
        "choice": text,
        "store": choice.store,
        "page_tokens": store.page_tokens,
        "prefill_kernel": prefill,
        "decode_kernel": decode,
        "prefill": prefill_times(store, choice, config.heads),
    }
    same = ("store", "page_tokens", "decode_kernel")
    twin = next((other for other in known if all(other[what] == entry[what] for what in same)), None)
    entry["decode"] = [] if few else twin["decode"] if twin else decode_times(store, choice, config.heads)
    store.close()
    del store
    forget(shape.device)
    return entry


def awake() -> None:
    """Half a second of work, so that the first kernel meets the clocks that the others meet."""
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(300):
        square @ square
    torch.cuda.synchronize()


class Times:
    """Times of one store with its kernels."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.grid = {(each["new"], each["total"]): each["us"] for each in entry["prefill"]}
        # A step of decodes costs something by itself, by request, and by token that it reads.
        measured = entry["decode"]
        self.weights = numpy.zeros(3)
        #: By what share the measured times are missed, at the most.
        self.decode_error = 0.0
        if measured:
            work = [[1, each["requests"], each["requests"] * each["tokens"]] for each in measured]
            taken = numpy.array([each["us"] for each in measured])
            # Relative errors count, not those of the longest alone.
            shares = numpy.array(work) / taken[:, None]
            self.weights = numpy.linalg.lstsq(shares, numpy.ones(len(taken)), rcond=None)[0]
            self.decode_error = float(abs(shares @ self.weights - 1).max())

    def prefill(self, new: int, total: int) -> float:
        """Microseconds a layer for a request's part of a prompt: its work, which is measured exactly, at a rate
        between those of the measured shapes around it. No part takes less than the smallest that was measured."""
        return max(work(new, total) / self.rate(new, total), self.grid[NEW[0], TOTAL[0]])

    def rate(self, new: int, total: int) -> float:
        """Pairs of a new token and one that it sees, a microsecond: bilinear in the logarithms."""
        return interpolated(NEW, new, lambda known: self._rate(known, total))

    def _rate(self, new: int, total: int) -> float:
        totals = sorted(known for count, known in self.grid if count == new)
        return interpolated(totals, total, lambda known: work(new, known) / self.grid[new, known])

    def decode(self, steps: int, requests: int, tokens: int) -> float:
        """Microseconds a layer of so many steps, with so many requests and tokens in all of them together."""
        return float(self.weights @ [steps, requests, tokens])

    def attention(self, run: dict[str, Any], layers: int) -> tuple[float, float]:
        """Seconds that prefill's attention and decode's take in a run, from what was computed in it."""
        prefill = sum(self.prefill(new, total) for new, total in run["prefills"])
        decoded = run["decodes"]
        decode = self.decode(decoded["steps"], decoded["requests"], decoded["tokens"])
        return layers * prefill / 1e6, layers * decode / 1e6


def work(new: int, total: int) -> float:
    """Pairs of a new token and one that it sees."""
    return new * (total - (new - 1) / 2)


def interpolated(known: Sequence[int], wanted: int, of: Callable[[int], float]) -> float:
    """What a function would be for a number, from its values at the neighbours among those known: linear in the
    logarithm. The ends serve for what lies beyond them."""
    wanted = min(max(wanted, known[0]), known[-1])
    below = max(number for number in known if number <= wanted)
    above = min(number for number in known if number >= wanted)
    if below == above:
        return of(below)
    share = math.log(wanted / below) / math.log(above / below)
    return (1 - share) * of(below) + share * of(above)


NAMES = ("store", "page_tokens", "prefill_kernel", "decode_kernel")
"""What says which kernels an entry, or a run, is of."""


def find(entries: Sequence[dict[str, Any]], run: dict[str, Any]) -> Times | None:
    """The times of the store, pages and kernels that a run had."""
    for entry in entries:
        if all(entry[name] == run[name] for name in NAMES):
            return Times(entry)
    return None


def best(entries: Sequence[dict[str, Any]], store: str, runs: Sequence[dict[str, Any]], layers: int) -> str:
    """The choice of pages and kernels with which attention takes a store the least time in these runs."""

    def cost(entry: dict[str, Any]) -> float:
        times = Times(entry)
        return sum(sum(times.attention(run, layers)) for run in runs)

    entry = min((entry for entry in entries if entry["store"] == store), key=cost)
    return str(Choice(*(entry[name] for name in NAMES)))


def main(arguments: list[str] | None = None) -> int:
    """Measures what the file does not have yet."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--budget", type=int, default=26, help="GiB of memory for a cache")
    options = made.parse_args(arguments)
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "layers": LAYERS, "complete": False, "entries": []}
    found |= read(options.out)
    entries = found["entries"]
    awake()
    with torch.inference_mode():
        for text in CHOICES:
            if all(entry["choice"] != text for entry in entries):
                entries.append(measured(text, Config(), options.budget << 30, entries))
                write(options.out, found)
                print(f"{text}: measured", flush=True)
    write(options.out, found | {"complete": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())

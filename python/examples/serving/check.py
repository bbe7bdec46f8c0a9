"""Is every kernel right over every cache that it can read? In seconds, before anything is timed.

    python check.py

Two layers of Llama-3-8B's attention, random tokens, requests of lengths around the ends of pages and tiles with a
hole among them; each kernel against SDPA over gathered rows. Decode is also captured into a graph, planned for other
requests and replayed, as the engine does.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from choices import Choice
from kernel_times import CHOICES, fill
from kernels import DECODE, PREFILL, Decode, Prefill, ReferencePrefill, names
from model import Config
from passes import captured
from store import Shape, Store

LENGTHS = (1, 15, 16, 17, 300, 1000, 2500, 4000)
WIDTH = 16
BOUND = 0.02
"""The largest error by the largest output: bfloat16 has 8 bits."""


def filled(store: Store, layers: int) -> numpy.ndarray:
    """Places of random tokens, one for each of `LENGTHS`, and a hole."""
    places = [store.begin(length) for length in (*LENGTHS[:3], 500, *LENGTHS[3:])]
    store.end(places.pop(3))
    return fill(store, places, LENGTHS, layers)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest by the largest output; infinite where one is no number."""
    most = float((found.float() - right.float()).abs().max() / right.float().abs().max())
    return math.inf if math.isnan(most) else most


def answered(kernel: Prefill | Decode, layer: int, query: torch.Tensor) -> torch.Tensor:
    """A kernel's output."""
    out = torch.full_like(query, math.nan)
    kernel.run(layer, query, out)
    return out


def errors(choice: Choice, shape: Shape, heads: int) -> dict[str, float]:
    """Of prefill, of decode, and of decode in a graph that was captured for other requests."""
    store = choice.open(shape)
    on_card = shape.device.type == "cuda"
    try:
        places, lengths = filled(store, shape.layers), numpy.array(LENGTHS, numpy.int64)
        reference = ReferencePrefill(store, heads)
        found = {"prefill": 0.0, "decode": 0.0, "replayed": 0.0}

        def query(count: int) -> torch.Tensor:
            return torch.randn(count, heads, shape.head_dim, dtype=shape.dtype, device=shape.device)

        def compare(what: str, given: torch.Tensor, layer: int, of: torch.Tensor) -> None:
            found[what] = max(found[what], error(given, answered(reference, layer, of)))

        prefill_name, decode_name = names(store, choice.prefill, choice.decode)
        prefill = PREFILL[prefill_name](store, heads)
        new = numpy.minimum(lengths, 700)
        prefill.plan(places, new, lengths)
        reference.plan(places, new, lengths)
        asked = query(int(new.sum()))
        for layer in range(shape.layers):
            compare("prefill", answered(prefill, layer, asked), layer, asked)

        decode = DECODE[decode_name](store, heads, WIDTH)
        asked = query(WIDTH)

        def planned(some: Sequence[int]) -> None:
            which = numpy.array(some, numpy.int64)
            decode.plan(places[which], lengths[which])
            reference.plan(places[which], numpy.ones(len(which), numpy.int64), lengths[which])

        def all_layers() -> list[torch.Tensor]:
            return [answered(decode, layer, asked) for layer in range(shape.layers)]

        if on_card:
            planned([])
            graph, outputs = captured(all_layers)
        for some in ([7, 2, 4], list(range(len(LENGTHS)))):
            planned(some)
            for layer, given in enumerate(all_layers()):
                compare("decode", given[: len(some)], layer, asked[: len(some)])
            if on_card:
                graph.replay()
                for layer, given in enumerate(outputs):
                    compare("replayed", given[: len(some)], layer, asked[: len(some)])
        return found
    finally:
        store.close()


def main(arguments: list[str] | None = None) -> int:
    """Checks all choices, and says which are wrong."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stores", default=",".join(CHOICES))
    options = made.parse_args(arguments)
    config = replace(Config(), layers=2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    wrong = 0
    with torch.inference_mode():
        for text in options.stores.split(","):
            choice = Choice.read(text)
            if device.type == "cpu":
                choice = replace(choice, prefill=None, decode=None)
            of = config.layers, config.kv_heads, config.head_dim, torch.bfloat16, device
            shape = Shape(*of, budget=1 << 30, longest=4096, most=WIDTH)
            found = errors(choice, shape, config.heads)
            right = all(number <= BOUND for number in found.values())
            wrong += not right
            told = ", ".join(f"{what} {number:.5f}" for what, number in found.items())
            print(f"{text:32} {told}{'' if right else '  WRONG'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())

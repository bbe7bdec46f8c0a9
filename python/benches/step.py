"""What does a step from Python cost where nothing has to be mapped, in each form in which it can be given?

256 slots in use, each of a length that does not change: what is left is the way into the library and its own
look at every slot. The goal is 10 µs for buffers. Prints microseconds a call: median and 99th percentile.

    python python/benches/step.py [slots] [rounds]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

import vattn


def measured(call: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median and 99th percentile in microseconds."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begun)
    return tuple(float(np.percentile(times, which)) / 1000 for which in (50, 99))  # type: ignore[return-value]


def main(count: int = 256, rounds: int = 5000) -> None:
    model = vattn.Geometry.preset("llama-3-8b")
    driver = vattn.LedgerDriver("1TiB")
    with vattn.KvCache(model, driver, budget="512GiB", max_slots=count) as cache:
        slots = [cache.acquire() for _ in range(count)]
        lengths = [100 + k for k in range(count)]
        batch = vattn.Batch(slots, lengths)
        tokens = np.asarray(batch.tokens)
        records = np.zeros(
            count, np.dtype([("index", "u4"), ("cache", "u4"), ("generation", "u8"), ("tokens", "u8")])
        )
        for name in ("index", "cache", "generation"):
            records[name] = [getattr(slot, name) for slot in slots]
        records["tokens"] = lengths
        indices, counts = records["index"].astype(np.int32), np.array(lengths, np.int32)
        pairs = list(zip(slots, lengths, strict=True))
        cache.step(batch)

        def counted() -> None:
            np.add(tokens, 0, out=tokens)
            cache.step(batch)

        print(f"{count} slots, nothing to map, {rounds} rounds: microseconds a call")
        print(f"{'form':<42} {'p50':>8} {'p99':>8}")
        for name, call in {
            "a Batch": lambda: cache.step(batch),
            "a Batch, lengths written through NumPy": counted,
            "a buffer of entries": lambda: cache.step(records),
            "index and length buffers (int32)": lambda: cache.step(indices, counts),
            "lists of slots and lengths": lambda: cache.step(slots, lengths),
            "pairs": lambda: cache.step(pairs),
        }.items():
            measured(call, rounds // 10)
            p50, p99 = measured(call, rounds)
            print(f"{name:<42} {p50:>8.2f} {p99:>8.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

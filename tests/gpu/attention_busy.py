#!/usr/bin/env python3
"""Is attention as fast beside a mapper that is always at work as beside one that sleeps?

    attention_busy.py OUT [--goal 0.99] [--rounds 12]     writes OUT/attention_busy.md and .json

A kernel is replayed from a CUDA graph over a cache's memory, in rounds of a tenth of a second. In turns
nobody else does anything, or the mapper of another cache on the same card *maps* (prompts for 8 slots ahead of
their requests, a granule for each layer's keys and values, and unmaps them when those have gone), or it
*creates* too (the memory is given back each time and made anew). All replays of a round are in the stream at
once, so what is measured is the kernels. `launch` is what a replay took the host.

It fails where the geometric mean of the ratios, the idle rounds' median time by the busy ones', is below the
goal, or any ratio below it by more than 0.03; and where the mapper's time in the driver's calls was less than
half of the busy time. A kernel that is not installed is a SKIP, and with VATTN_REQUIRE_GPU=1 a failure.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import attention
import vattn_bridge as bridge

WORK = (("torch-varlen", attention.Shape(32, 4096, 1)), ("fa3-batch", attention.Shape(32, 4096, 1)),
        ("torch-varlen", attention.Shape(8, 16384, 1)), ("fa3-batch", attention.Shape(8, 16384, 1)),
        ("fa3-batch", attention.Shape(1, 8192, 8192)))
LAYOUTS = ("per-layer", "sliced")
MOVES = ("create", "map", "set_access", "unmap", "release")
ROUND_SECONDS = 0.1
LEAST_SHARE = 0.5


class Mapping:
    """A cache whose mapper, while it is busy, always has memory to map or to unmap."""

    def __init__(self, device="cuda", creates=False, layers=32, slots=8, tokens=1024, **options):
        self.slots, self.tokens, self.creates = slots, tokens, creates
        self.cache = bridge.Cache(device, layers=layers, kv_heads=attention.KV_HEADS, key_dim=attention.DIM,
                                  slots=slots, max_tokens=tokens, layout="per-layer", mapper=True, **options)
        self.pool = ThreadPoolExecutor(1)
        self.calls, self.driver_seconds, self.seconds = dict.fromkeys(MOVES, 0), 0.0, 0.0

    def turn(self):
        slots = [self.cache.acquire() for _ in range(self.slots)]
        self.cache.prefetch(dict.fromkeys(slots, self.tokens))
        self.cache.flush()
        for slot in slots:
            self.cache.retire(slot)
        if self.creates:
            self.cache.trim()
        else:
            self.cache.reclaim()
        self.cache.flush()

    def turns(self, begun, ended):
        self.turn()
        begun.set()
        while not ended.is_set():
            self.turn()

    @contextmanager
    def busy(self):
        """The mapper works for as long as this lasts."""
        before, start = self.cache.snapshot()["background"], time.perf_counter()
        begun, ended = Event(), Event()
        turns = self.pool.submit(self.turns, begun, ended)
        # Where a turn fails, the failure is told below.
        while not begun.wait(0.01) and not turns.done():
            pass
        try:
            yield
        finally:
            ended.set()
            turns.result()
        after = self.cache.snapshot()["background"]
        self.seconds += time.perf_counter() - start
        for verb in MOVES:
            self.calls[verb] += after[verb]["calls"] - before[verb]["calls"]
            self.driver_seconds += (after[verb]["nanoseconds"] - before[verb]["nanoseconds"]) / 1e9

    @property
    def share(self):
        """Of the busy time, what the mapper was in calls of the driver."""
        return self.driver_seconds / self.seconds if self.seconds else 0.0

    def close(self):
        self.pool.shutdown()
        self.cache.close()


@contextmanager
def idle():
    yield


def one_round(torch, graph, replays):
    """Milliseconds of a replay, and microseconds to launch one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    for _ in range(replays):
        graph.replay()
    launch = (time.perf_counter() - start) / replays * 1e6
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / replays, launch


def measure(torch, memories, kernel, states, rounds):
    """For each state the median milliseconds of a graph and microseconds to launch it."""
    import kernel_calls

    shape = memories.shape
    queries = [torch.randn(shape.new, attention.KV_HEADS * attention.GROUP, attention.DIM, device="cuda").bfloat16()
               for _ in range(shape.batch)]
    runs = [kernel_calls.CALLS[kernel](memories.batch(layer, True), queries, shape.new > 1)
            for layer in memories.layers]
    # Before they are captured: some plan at their first call.
    for run in runs:
        run()
    graph = attention.capture(torch, runs, 1)
    graph.replay()
    replays = max(1, round(ROUND_SECONDS / (attention.milliseconds(torch, graph.replay, 5) / 1000)))
    found = {state: [] for state in states}
    for turn in range(rounds):
        for state in list(states)[::1 if turn % 2 == 0 else -1]:
            with states[state]():
                found[state].append(one_round(torch, graph, replays))
    return {state: tuple(map(statistics.median, zip(*pairs))) for state, pairs in found.items()}


def run(out, goal, rounds):
    began = time.monotonic()
    required = os.environ.get("VATTN_REQUIRE_GPU") == "1"
    torch = attention.torch_on_a_card("attention_busy")
    if torch is None:
        return 1 if required else 0
    import kernel_calls

    mappings = {"maps": Mapping(), "creates": Mapping(creates=True)}
    states = {"idle": idle, **{name: mapping.busy for name, mapping in mappings.items()}}
    found, wrong, skipped = [], [], set()
    for layout in LAYOUTS:
        for kernel, shape in WORK:
            if kernel in skipped:
                continue
            memories = attention.Memories(layout, shape)
            where = f"{kernel}, {layout}, {shape}"
            try:
                medians = measure(torch, memories, kernel, states, rounds)
            except kernel_calls.Missing as error:
                print(f"SKIP {kernel}: {error}", flush=True)
                skipped.add(kernel)
                continue
            finally:
                memories.close()
            row = {"kernel": kernel, "layout": layout, "shape": str(shape), "idle_ms": medians["idle"][0],
                   "idle_launch_us": medians["idle"][1]}
            for name in mappings:
                row |= {f"{name}_ratio": medians["idle"][0] / medians[name][0], f"{name}_launch_us": medians[name][1]}
                if row[f"{name}_ratio"] < goal - attention.LEEWAY:
                    wrong.append(f"{where}: {row[f'{name}_ratio']:.3f} while the mapper {name}")
            found.append(row)
            print(f"{where}: {row}", flush=True)
    means = {name: math.exp(statistics.fmean(math.log(row[f"{name}_ratio"]) for row in found))
             for name in mappings if found}
    wrong += [f"the mean ratio is {mean:.4f} while the mapper {name}, and the goal {goal}"
              for name, mean in means.items() if mean < goal]
    wrong += [f"the mapper that {name} was in the driver {mapping.share:.2f} of its time, which is hardly busy"
              for name, mapping in mappings.items() if found and mapping.share < LEAST_SHARE]
    mappers = {name: {"calls": mapping.calls, "share": mapping.share, "seconds": mapping.seconds}
               for name, mapping in mappings.items()}
    text = markdown(found, means, mappers, rounds, torch)
    for mapping in mappings.values():
        mapping.close()
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention_busy.md").write_text(text)
    (out / "attention_busy.json").write_text(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "goal": goal, "means": means,
        "mappers": mappers, "rows": found, "wrong": wrong, "skipped": sorted(skipped)}, indent=1))
    print(text)
    print("\n".join("WRONG " + line for line in wrong) or "every ratio is within the goal")
    print(f"{len(found)} measurements in {time.monotonic() - began:.0f} s, skipped: "
          f"{', '.join(sorted(skipped)) or 'none'}")
    return 1 if wrong or not found or (required and skipped) else 0


def markdown(found, means, mappers, rounds, torch):
    lines = ["Attention beside a mapper at work: throughput in relation to that beside an idle one, and µs to "
             "launch a graph:", "",
             "| kernel | layout | work | idle, ms a graph | launch | maps | launch | creates | launch |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in found:
        busy = " | ".join(f"{row[f'{name}_ratio']:.4f} | {row[f'{name}_launch_us']:.1f}" for name in mappers)
        lines.append(f"| {row['kernel']} | {row['layout']} | {row['shape']} | {row['idle_ms']:.3f} | "
                     f"{row['idle_launch_us']:.1f} | {busy} |")
    lines.append("| geometric mean | | | | | " + " | | ".join(f"**{mean:.4f}**" for mean in means.values()) + " | |")
    for name, mapper in mappers.items():
        calls = ", ".join(f"{verb} {count:,}" for verb, count in mapper["calls"].items())
        lines += ["", f"The mapper that {name} was in the driver for {mapper['share']:.0%} of {mapper['seconds']:.1f} s: "
                  f"{calls}."]
    return "\n".join(lines) + (
        f"\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; graphs over "
        f"{attention.RUN_OVER} layers, medians of {rounds} rounds of {ROUND_SECONDS} s in turns.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for attention_busy.md and attention_busy.json")
    parser.add_argument("--goal", type=float, default=0.99, help="the least mean ratio")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each state")
    arguments = parser.parse_args()
    return run(arguments.out, arguments.goal, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())

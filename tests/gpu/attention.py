#!/usr/bin/env python3
"""Is attention over our memory as fast as over cudaMalloc's?

    attention.py OUT [--goal 0.99] [--seconds 170]     writes OUT/attention.md and .json

The same kernel, replayed from a CUDA graph, over two memories of the same shape and strides: a cache's,
mapped extent by extent, and a twin of each of its tensors from `torch.empty`. The replays take turns in one
run, and what counts is the ratio of the medians: cudaMalloc's time by ours. It fails where the geometric
mean of a kernel's ratios is below the goal, or where any ratio is below it by more than 0.03. A kernel that
is not installed is a SKIP, and with VATTN_REQUIRE_GPU=1 a failure. FlashInfer compiles its kernels where
they are first used; run `kernels.py` first, or give more seconds.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

KV_HEADS, GROUP, DIM = 8, 4, 128
# Layers that a graph runs over: together they are more than the L2 cache holds.
LAYERS = {"per-layer": 4, "sliced": 32}
RUN_OVER = 4
REPLAYS = 24
GRAPH_SECONDS = 1e-3
LEEWAY = 0.03


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `context` tokens, the last `new` of which ask."""

    batch: int
    context: int
    new: int

    def __str__(self):
        work = "decode" if self.new == 1 else "prefill"
        return f"decode {self.batch} × {self.context:,}" if self.new == 1 else f"{work} {self.new:,} / {self.context:,}"


SHAPES = (Shape(32, 4096, 1), Shape(8, 16384, 1), Shape(1, 65536, 1), Shape(128, 1024, 1),
          Shape(1, 8192, 2048), Shape(1, 8192, 8192), Shape(1, 32768, 32768))


def kernels_for(shape):
    if shape.new == 1:
        return ("torch-varlen", "sdpa-flash", "sdpa-cudnn", "fa3-batch", "flashinfer-decode-tc")
    # SDPA's causal mask starts at the first key, so that it means the same only where all tokens are new.
    sdpa = ("sdpa-flash", "sdpa-cudnn") if shape.new == shape.context else ()
    return ("torch-varlen", *sdpa, "fa3-batch", "flashinfer-prefill-fa2", "flashinfer-prefill-fa3")


class Memories:
    """A cache filled to the brim, and its twin."""

    def __init__(self, layout, shape):
        import torch
        import vattn_bridge as bridge

        self.torch, self.bridge, self.shape = torch, bridge, shape
        self.cache = bridge.Cache("cuda", layers=LAYERS[layout], kv_heads=KV_HEADS, key_dim=DIM, slots=shape.batch,
                                  max_tokens=shape.context, layout=layout)
        self.cache.step(dict.fromkeys(self.cache.acquire_all(), shape.context))
        self.twins = [torch.empty(tensor.size // 2, dtype=torch.bfloat16, device="cuda")
                      for tensor in self.cache.tensors]
        every = LAYERS[layout] // RUN_OVER
        self.layers = [every * (number + 1) - 1 for number in range(RUN_OVER)]
        for layer in self.layers:
            for part in (bridge.KEY, bridge.VALUE):
                ours, twin = self.view(layer, part, 0, True), self.view(layer, part, 0, False)
                for slot in range(shape.batch):
                    twin[slot].normal_()
                    ours[slot].copy_(twin[slot])

    def view(self, layer, part, kind, ours):
        view = self.cache.view(layer, part, kind)
        if ours:
            return self.bridge.torch_view(view)
        [(twin, tensor)] = [(twin, tensor) for twin, tensor in zip(self.twins, self.cache.tensors)
                            if tensor.addr <= view.addr < tensor.addr + tensor.size]
        return twin.as_strided(view.shape, view.strides, (view.addr - tensor.addr) // 2)

    def batch(self, layer, ours):
        import kernel_calls

        views = [self.view(layer, part, kind, ours) for kind in (0, 1, 2) for part in (0, 1)]
        facts = self.cache.facts
        return kernel_calls.Batch(*views[:4], views[4][0], views[5][0], facts.stride_tokens, facts.pages_per_slot,
                                  [self.shape.context] * self.shape.batch)

    def close(self):
        self.torch.cuda.synchronize()
        self.cache.close()
        del self.twins
        self.torch.cuda.empty_cache()


def milliseconds(torch, work, times):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def capture(torch, runs, times):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for run in runs:
                run()
    return graph


def measure(torch, memories, kernel):
    """Microseconds of one call over cudaMalloc's memory and over ours, and whether the results agree."""
    import kernel_calls

    shape = memories.shape
    queries = [torch.randn(shape.new, KV_HEADS * GROUP, DIM, device="cuda").bfloat16() for _ in range(shape.batch)]
    causal = shape.new > 1
    runs = {ours: [kernel_calls.CALLS[kernel](memories.batch(layer, ours), queries, causal)
                   for layer in memories.layers] for ours in (False, True)}
    # Every one before it is captured: some plan at their first call.
    outputs = [[run() for run in runs[ours]][0] for ours in (False, True)]
    outputs = [kernel_calls.split(output, queries) for output in outputs]
    apart = max(float(torch.linalg.norm((ours - twin).float()) / torch.linalg.norm(twin.float()))
                for twin, ours in zip(*outputs))
    del outputs
    one = milliseconds(torch, runs[False][0], 3) / 1000
    layers = max(1, min(RUN_OVER, int(8e-3 / one)))
    times = max(1, math.ceil(GRAPH_SECONDS / (one * layers)))
    graphs = {ours: capture(torch, runs[ours][:layers], times) for ours in (False, True)}
    for _ in range(3):
        for graph in graphs.values():
            graph.replay()
    events = {False: [], True: []}
    for turn in range(REPLAYS):
        for ours in (turn % 2 == 0, turn % 2 == 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[ours].replay()
            end.record()
            events[ours].append((begin, end))
    torch.cuda.synchronize()
    medians = {ours: 1000 * statistics.median(begin.elapsed_time(end) for begin, end in pairs) / (layers * times)
               for ours, pairs in events.items()}
    return medians[False], medians[True], apart


def torch_on_a_card(name):
    """PyTorch, if it and a card are there."""
    # The twins are cudaMalloc's, not mapped piece by piece as ours are.
    os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    try:
        import torch
        import kernel_calls  # noqa: F401
        torch.zeros(1, device="cuda")
    except (ImportError, RuntimeError, AssertionError) as error:
        print(f"SKIP {name}: {error}")
        return None
    return torch


def run(out, goal, limit):
    began = time.monotonic()
    required = os.environ.get("VATTN_REQUIRE_GPU") == "1"
    torch = torch_on_a_card("attention")
    if torch is None:
        return 1 if required else 0
    import kernel_calls
    found, wrong, skipped = [], [], set()
    for layout in LAYERS:
        for shape in SHAPES:
            if time.monotonic() - began > limit:
                wrong.append(f"{layout}, {shape}: no time was left for it")
                continue
            memories = Memories(layout, shape)
            for kernel in kernels_for(shape):
                if kernel in skipped:
                    continue
                where = f"{kernel}, {layout}, {shape}"
                try:
                    twin, ours, apart = measure(torch, memories, kernel)
                except kernel_calls.Missing as error:
                    print(f"SKIP {kernel}: {error}", flush=True)
                    skipped.add(kernel)
                    continue
                except Exception as error:
                    wrong.append(f"{where}: {type(error).__name__}: {error}"[:1000])
                    print(f"ERROR {wrong[-1]}", flush=True)
                    continue
                ratio = twin / ours
                found.append({"kernel": kernel, "layout": layout, "shape": str(shape), "cudaMalloc_us": twin,
                              "ours_us": ours, "ratio": ratio, "apart": apart})
                print(f"{where}: {twin:.1f} µs, ours {ours:.1f} µs, {ratio:.3f}", flush=True)
                if not apart < 1e-3:
                    wrong.append(f"{where}: the results differ by {apart}")
                if ratio < goal - LEEWAY:
                    wrong.append(f"{where}: ratio {ratio:.3f}")
            memories.close()
    means = {}
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        ratios = [row["ratio"] for row in found if row["kernel"] == kernel]
        means[kernel] = math.exp(statistics.fmean(map(math.log, ratios)))
        if means[kernel] < goal:
            wrong.append(f"{kernel}: the mean ratio is {means[kernel]:.4f}, and the goal {goal}")
    text = markdown(found, means, torch)
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention.md").write_text(text)
    (out / "attention.json").write_text(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "goal": goal, "means": means, "rows": found, "wrong": wrong, "skipped": sorted(skipped),
        "seconds": round(time.monotonic() - began)}, indent=1))
    print(text)
    print("\n".join(["WRONG " + line for line in wrong]) or "every ratio is within the goal")
    print(f"{len(found)} measurements in {time.monotonic() - began:.0f} s, skipped: "
          f"{', '.join(sorted(skipped)) or 'none'}")
    return 1 if wrong or not found or (required and skipped) else 0


def markdown(found, means, torch):
    lines = ["Throughput over a cache's memory in relation to cudaMalloc's, and µs a call over the cache's:", "",
             "| work | layout | " + " | ".join(means) + " |", "|---|---|" + "---|" * len(means)]
    cells = {(row["shape"], row["layout"], row["kernel"]): f"{row['ratio']:.3f} ({row['ours_us']:,.1f})"
             for row in found}
    for layout in LAYERS:
        lines += [f"| {shape} | {layout} | " + " | ".join(
            cells.get((str(shape), layout, kernel), "–") for kernel in means) + " |" for shape in SHAPES]
    lines.append("| geometric mean | | " + " | ".join(f"**{mean:.4f}**" for mean in means.values()) + " |")
    return "\n".join(lines) + (
        f"\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; graph replay, "
        f"medians of {REPLAYS} replays each in turns; {KV_HEADS} KV heads, {KV_HEADS * GROUP} query heads of {DIM}, "
        "bf16.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for attention.md and attention.json")
    parser.add_argument("--goal", type=float, default=0.99, help="the least mean ratio")
    parser.add_argument("--seconds", type=float, default=170, help="when to start no more shapes")
    arguments = parser.parse_args()
    return run(arguments.out, arguments.goal, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())

"""Serves a trace with each of the caches, in interleaved rounds of one process, and writes what came of it.

    python bench.py --trace azure_llm_2023_conv.csv --stores vattn,paged,static --rounds 3 --json results.json

Without a GPU, `--tiny` serves a tiny model on the processor: it shows that all works, and no speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import workload
from engine import Engine, Report, Request
from model import Config, Model
from store import Shape, Store


def store_vattn(shape: Shape, options: argparse.Namespace) -> Store:
    from store_vattn import Vattn

    # FlashAttention-3 reads whole tiles where it decodes over the batch.
    tile = 128 if options.decode == "fa3" else 1
    return Vattn(shape, layout=options.layout, page_tokens=options.page_tokens, tile_tokens=tile)


def store_paged(shape: Shape, options: argparse.Namespace) -> Store:
    from store_paged import Paged

    return Paged(shape, page_tokens=options.page_tokens)


def store_static(shape: Shape, options: argparse.Namespace) -> Store:
    from store_static import Static

    return Static(shape)


STORES: dict[str, Callable[[Shape, argparse.Namespace], Store]] = {
    "vattn": store_vattn,
    "paged": store_paged,
    "static": store_static,
}


def quantiles(numbers: list[float]) -> dict[str, float]:
    """The middle and the upper ends of a distribution."""
    if not numbers:
        return {}
    ordered = sorted(numbers)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p50": statistics.median(ordered), "p90": at(0.9), "p99": at(0.99), "most": ordered[-1]}


def first_token(request: Request) -> float:
    """Seconds from its arrival to the first token of its answer (TTFT)."""
    return request.times[0] - request.arrival


def each_token(request: Request) -> float:
    """Seconds for each further token of its answer (TPOT)."""
    return (request.times[-1] - request.times[0]) / (len(request.times) - 1)


def thinned(entries: list, most: int = 400) -> list:
    """No more than so many of them, evenly spread."""
    return entries[:: -(-len(entries) // most) or 1]


def summary(requests: list[Request], report: Report) -> dict:
    """A run in numbers: seconds, tokens a second, time to the first token and for each further one."""
    ttft = [first_token(request) for request in requests]
    tpot = [each_token(request) for request in requests if len(request.times) > 1]
    prompts = sum(len(request.prompt) for request in requests)
    answers = sum(len(request.tokens) for request in requests)
    spans = [after[0] - before[0] for before, after in zip(report.active, report.active[1:])]
    busy = sum(spans)
    return {
        "seconds": report.seconds,
        "requests": len(requests),
        "prompt_tokens": prompts,
        "answer_tokens": answers,
        "tokens_per_second": (prompts + answers) / report.seconds,
        "answer_tokens_per_second": answers / report.seconds,
        "ttft": quantiles(ttft),
        "tpot": quantiles(tpot),
        "steps": report.steps,
        "graphed_steps": report.graphed,
        "preempted": report.preempted,
        "allocating_share": report.allocating / report.seconds,
        "mean_active": sum(span * entry[1] for span, entry in zip(spans, report.active)) / busy
        if busy
        else 0.0,
        "most_held": max((held for _, _, held in report.active), default=0),
        "samples": {"ttft": sorted(ttft), "tpot": sorted(tpot), "memory": thinned(report.active)},
    }


def served(
    model: Model, shape: Shape, name: str, options: argparse.Namespace, requests: list[Request]
) -> dict:
    """One run of one store."""
    store = STORES[name](shape, options)
    try:
        engine = Engine(model, store, prefill=options.prefill, decode=options.decode, chunk=options.chunk)
        # What is compiled or captured at first use is not what a server's users wait for.
        engine.run(
            [
                replace(request, answer=min(request.answer, 8), arrival=0.0, tokens=[], times=[])
                for request in requests[: options.warm_up]
            ]
        )
        return summary(requests, engine.run(requests)) | {
            "prefill_kernel": engine.prefill_name,
            "decode_kernel": engine.decode_name,
        }
    finally:
        store.close()
        del store
        gc.collect()
        if shape.device.type == "cuda":
            torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--trace", type=Path, required=True)
    made.add_argument("--stores", default="vattn,paged,static")
    made.add_argument(
        "--model", type=Path, help="a Hugging Face folder; without, random weights of Llama-3-8B's shape"
    )
    made.add_argument("--tiny", action="store_true", help="a tiny model on the processor")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--limit", type=int, help="how many requests")
    made.add_argument("--load", type=float, default=1.0, help="divides the times between arrivals")
    made.add_argument("--shorten", type=float, default=1.0, help="divides the prompts' lengths")
    made.add_argument("--longest", type=int, default=8192, help="tokens of the longest request")
    made.add_argument("--most", type=int, default=256, help="requests at a time")
    made.add_argument("--budget", type=float, default=40.0, help="GiB of memory for the cache")
    made.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    made.add_argument("--page-tokens", type=int, default=16)
    made.add_argument("--layout", default="sliced", type=lambda text: int(text) if text.isdigit() else text)
    made.add_argument("--prefill")
    made.add_argument("--decode")
    made.add_argument("--warm-up", type=int, default=8)
    made.add_argument("--json", type=Path)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs it."""
    options = parser().parse_args(arguments)
    names = options.stores.split(",")
    if unknown := [name for name in names if name not in STORES]:
        print(f"there is no store {unknown[0]!r}; there are {', '.join(STORES)}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    if options.model:
        model = Model.load(options.model, options.longest, device=device, dtype=dtype)
    else:
        model = Model.random(
            Config.tiny() if options.tiny else Config(), options.longest, device=device, dtype=dtype
        )
    config = model.config
    shape = Shape(
        config.layers,
        config.kv_heads,
        config.head_dim,
        dtype,
        device,
        int(options.budget * 2**30),
        options.longest,
        options.most,
    )
    results: dict[str, list[dict]] = {name: [] for name in names}
    with torch.inference_mode():
        for turn in range(options.rounds):
            # Each round begins with another store, so that none is always the first.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                requests = workload.requests(
                    options.trace,
                    vocab=config.vocab,
                    longest=options.longest,
                    limit=options.limit,
                    load=options.load,
                    shorten=options.shorten,
                )
                found = served(model, shape, name, options, requests)
                results[name].append(found)
                print(
                    f"{name}, round {turn + 1}: {found['tokens_per_second']:,.0f} tokens/s, "
                    f"TTFT p50 {found['ttft']['p50']:.3f} s, time a token p50 {found['tpot']['p50'] * 1e3:.2f} ms, "
                    f"{found['preempted']} preempted, allocation {found['allocating_share']:.2%}",
                    flush=True,
                )
    if options.json:
        told = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
        }
        options.json.write_text(
            json.dumps({"options": told, "model": asdict(config), "results": results}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

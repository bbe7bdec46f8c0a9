"""Serves a trace with each of the caches, in interleaved rounds of one process, and writes what came of it.

    python bench.py --trace azure_llm_2023_conv.csv --stores vattn:64,paged:16,static --rounds 3 --json results.json

Without a GPU, `--tiny` serves a tiny model on the processor: it shows that all works, and no speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
from choices import Choice
from engine import Call, Engine, Report, Request
from model import Config, Model
from store import Shape, forget


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


def thinned(entries: list[Any], most: int = 200) -> list[Any]:
    """No more than so many of them, evenly spread."""
    return entries[:: -(-len(entries) // most) or 1]


def mean_active(report: Report) -> float:
    """How many requests had memory, in the mean over the steps in which another one had to wait for it; over all of
    them where none had to."""
    spans = [(after.at - before.at, after) for before, after in zip(report.moments, report.moments[1:])]
    spans = [(span, moment) for span, moment in spans if moment.refused] or spans
    seconds = sum(span for span, _ in spans)
    return sum(span * moment.active for span, moment in spans) / seconds if seconds else 0.0


def spent(calls: Iterable[Call], hidden: bool) -> float:
    """Seconds in the store's calls that ended while the device computed; or in the others, which it waited for."""
    return sum(call.seconds for call in calls if call.hidden is hidden)


def by_name(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Each of the store's calls with all the times that it was made."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.name, []).append(call)
    return found


def summary(requests: list[Request], report: Report) -> dict[str, Any]:
    """A run in numbers: seconds, tokens a second, time to the first token and for each further one."""
    ttft = [first_token(request) for request in requests]
    tpot = [each_token(request) for request in requests if len(request.times) > 1]
    prompts = sum(len(request.prompt) for request in requests)
    answers = sum(len(request.tokens) for request in requests)
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
        "allocating_share": spent(report.calls, hidden=False) / report.seconds,
        "allocating_hidden_share": spent(report.calls, hidden=True) / report.seconds,
        "store_calls": {
            name: {
                "calls": len(calls),
                "seconds_waited_for": spent(calls, hidden=False),
                "seconds_hidden": spent(calls, hidden=True),
            }
            | quantiles([call.seconds for call in calls])
            for name, calls in by_name(report.calls).items()
        },
        "mean_active": mean_active(report),
        "most_held": max((moment.held for moment in report.moments), default=0),
        "samples": {
            "ttft": [round(seconds, 5) for seconds in sorted(ttft)],
            "tpot": [round(seconds, 7) for seconds in sorted(tpot)],
            "moments": [
                (round(moment.at, 3), moment.active, moment.held) for moment in thinned(report.moments)
            ],
        },
        "spans": {
            name: {
                "steps": len(spans),
                "launching": quantiles([span.launching for span in spans]),
                "computing": quantiles([span.computing for span in spans]),
            }
            for name, spans in (
                ("mixed", [span for span in report.spans if span.mixed]),
                ("decodes", [span for span in report.spans if not span.mixed]),
            )
        },
        "prefills": report.prefills,
        "decodes": {
            "steps": len(report.decodes),
            "requests": sum(count for count, _ in report.decodes),
            "tokens": sum(tokens for _, tokens in report.decodes),
        },
    }


def fresh(requests: Iterable[Request], **changes: Any) -> list[Request]:
    """The same requests, not served yet."""
    return [replace(request, tokens=[], times=[], kept=0, **changes) for request in requests]


class Server:
    """An engine over a store of a kind, warm: what is compiled or captured at first use is not what a server's users
    wait for."""

    def __init__(self, model: Model, shape: Shape, choice: Choice, *, chunk: int) -> None:
        self.store = choice.open(shape)
        self.engine = Engine(model, self.store, prefill=choice.prefill, decode=choice.decode, chunk=chunk)

    def warm(self, requests: list[Request]) -> None:
        """Serves the beginnings of some requests, which don't count."""
        if self.engine.graphs:
            self.engine.prepare()
        enough = 2 * self.engine.chunk
        self.engine.run(
            [
                replace(request, prompt=request.prompt[:enough], answer=min(request.answer, 8))
                for request in fresh(requests, arrival=0.0, forced=None)
            ]
        )

    def run(self, requests: list[Request]) -> Report:
        """Serves them, and no garbage is collected meanwhile."""
        gc.collect()
        gc.disable()
        try:
            return self.engine.run(requests)
        finally:
            gc.enable()

    def serve(self, requests: list[Request]) -> dict[str, Any]:
        """A run in numbers."""
        return summary(requests, self.run(requests)) | {
            "store": self.store.name,
            "page_tokens": self.store.page_tokens,
            "prefill_kernel": self.engine.prefill_name,
            "decode_kernel": self.engine.decode_name,
        }

    def close(self) -> None:
        """Gives the memory back."""
        device = self.store.shape.device
        self.store.close()
        del self.store, self.engine
        forget(device)


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """What a command line says of a trace and who serves it."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--trace", type=Path, required=True)
    made.add_argument(
        "--stores",
        default="vattn,paged,static",
        help="of each its name, the tokens of a page, and the kernels of prefill and decode: paged:16:flashinfer-fa2",
    )
    made.add_argument(
        "--model", type=Path, help="a Hugging Face folder; without, random weights of Llama-3-8B's shape"
    )
    made.add_argument("--tiny", action="store_true", help="a tiny model on the processor")
    made.add_argument("--limit", type=positive, help="how many requests")
    made.add_argument("--skip", type=int, default=0, help="requests of the trace that come before them")
    made.add_argument("--load", type=float, default=1.0, help="divides the times between arrivals")
    made.add_argument("--shorten", type=float, default=1.0, help="divides the prompts' lengths")
    made.add_argument("--longest", type=int, default=8192, help="tokens of the longest request")
    made.add_argument("--most", type=int, default=256, help="requests at a time")
    made.add_argument("--budget", type=float, default=40.0, help="GiB of memory for the cache")
    made.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    made.add_argument("--layout", default="sliced", type=lambda text: int(text) if text.isdigit() else text)
    made.add_argument("--warm-up", type=int, default=8)
    return made


def positive(text: str) -> int:
    """A number from 1."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of them; give 1 or more")
    return int(text)


def parsed(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """A command line whose stores there are."""
    options = made.parse_args(arguments)
    try:
        for text in options.stores.split(","):
            Choice.read(text)
    except ValueError as error:
        made.error(str(error))
    return options


def make_model(options: argparse.Namespace) -> Model:
    """The model that is asked for."""
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    if options.model:
        return Model.load(options.model, options.longest, device=device, dtype=dtype)
    config = Config.tiny() if options.tiny else Config()
    return Model.random(config, options.longest, device=device, dtype=dtype)


def shape_of(model: Model, options: argparse.Namespace) -> Shape:
    """What a cache has to keep for it."""
    config = model.config
    return Shape(
        config.layers,
        config.kv_heads,
        config.head_dim,
        model.dtype,
        model.device,
        int(options.budget * 2**30),
        options.longest,
        options.most,
    )


def requests_of(model: Model, options: argparse.Namespace) -> list[Request]:
    """The trace's requests."""
    return workload.requests(
        options.trace,
        vocab=model.config.vocab,
        longest=options.longest,
        limit=options.limit,
        skip=options.skip,
        load=options.load,
        shorten=options.shorten,
    )


def compare(
    model: Model,
    options: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Every store serves the same requests in each round, and each round begins with another one.

    `results` are those of rounds that were run before, and `keep` is told what there is after each run.
    """
    choices = [Choice.read(text, options.layout) for text in options.stores.split(",")]
    shape = shape_of(model, options)
    requests = requests_of(model, options)
    found = {
        "options": plain(options),
        "model": asdict(model.config),
        "results": results or {str(choice): [] for choice in choices},
    }
    with torch.inference_mode():
        for turn in range(options.rounds):
            first = turn % len(choices)
            for choice in choices[first:] + choices[:first]:
                runs = found["results"][str(choice)]
                if len(runs) > turn:
                    continue
                server = Server(model, shape, choice, chunk=options.chunk)
                try:
                    server.warm(requests[: options.warm_up])
                    runs.append(server.serve(fresh(requests)))
                finally:
                    server.close()
                keep(found)
                print(f"{choice}, round {turn + 1}: {told(runs[-1])}", flush=True)
    return found


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def write(path: Path, found: dict[str, Any]) -> None:
    """The file is the old one or the new one, whenever this is ended."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What was written there, or nothing where there is no file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path} is no part's file ({error}); remove it") from None


def told(found: dict[str, Any]) -> str:
    """A run in a line."""
    tpot = f"{found['tpot']['p50'] * 1e3:.2f} ms" if found["tpot"] else "none"
    return (
        f"{found['tokens_per_second']:,.0f} tokens/s, TTFT p50 {found['ttft']['p50']:.3f} s, time a token p50 {tpot}, "
        f"{found['preempted']} preempted, {found['mean_active']:.1f} active, "
        f"allocation {found['allocating_share']:.3%}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs it."""
    made = parser()
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--json", type=Path)
    options = parsed(made, arguments)
    keep = partial(write, options.json) if options.json else lambda found: None
    compare(make_model(options), options, keep=keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that is compared, in one command on a machine with a GPU, and a page that shows it.

    python head_to_head.py OUT --traces FOLDER

| part | what is asked |
|---|---|
| `check` | is every kernel right over every cache? |
| `kernels` | what does attention cost over each cache? |
| `agreement` | do all caches give the same logits? |
| `long` | long prompts, all there at the start: throughput |
| `decode` | answers of hundreds of tokens, 64 at a time: throughput |
| `online` | arrivals as recorded, at the load at which `paged` takes twice as long to the first token as unloaded |
| `tight` | little memory: how many requests are under way at a time? |

Each part is a file in OUT, written after each run: what is there is not run again, so all of it can be ended at any
time and called again, with more `--rounds` too. `--parts` names some. `paged` has, in each part, the pages and kernels
whose own times are the least for that part's requests, in `tight` the smallest pages, which waste least; `vattn` has one
layout and one size of pages throughout, `static` the contiguous kernels. `online` has a fourth, `bound`: `paged` if
prefill's attention took a copy's time, so what no kernel for prompts can do better. `--tiny` runs all but `check` and
`kernels` with a tiny model on the processor, to show that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import check
import kernel_times
import torch
from bench import (
    Server,
    compare,
    fresh,
    make_model,
    parser,
    plain,
    positive,
    quantiles,
    read,
    requests_of,
    shape_of,
    write,
)
from choices import Choice
from engine import Engine, Request
from model import Model
from store import Shape, forget

PARTS = ["check", "kernels", "agreement", "long", "decode", "online", "tight"]
PLAIN = {"vattn": "vattn", "paged": "paged", "static": "static"}
WORKLOADS = ["long", "decode", "online", "tight"]

OPTIONS: dict[str, dict[str, Any]] = {
    "long": {
        "trace": "arxiv_long_offline.csv",
        "limit": 4,
        "longest": 131072,
        "most": 16,
        "budget": 96,
        "chunk": 8192,
        "warm_up": 1,
    },
    "decode": {
        "trace": "sync_vs_async.csv",
        "limit": 128,
        "longest": 3072,
        "most": 64,
        "budget": 48,
        "chunk": 2048,
    },
    "online": {
        "trace": "azure_llm_2023_conv.csv",
        "limit": 250,
        "skip": 1000,
        "longest": 8192,
        "most": 256,
        "budget": 64,
        "chunk": 2048,
    },
    "tight": {
        "trace": "azure_llm_2023_conv.csv",
        "limit": 250,
        "skip": 1000,
        "load": 1e6,
        "longest": 8192,
        "most": 256,
        "budget": 8,
        "chunk": 2048,
    },
}
"""Of each part what bench.py is to do."""
TINY: dict[str, dict[str, Any]] = {
    "long": {"limit": 2, "shorten": 200, "longest": 2048, "most": 4, "budget": 0.06, "chunk": 128},
    "decode": {"limit": 4, "shorten": 50, "longest": 1024, "most": 4, "budget": 0.06},
    "online": {"limit": 4, "shorten": 10, "load": 100, "longest": 1024, "most": 4, "budget": 0.06},
    "tight": {"limit": 4, "shorten": 10, "longest": 1024, "most": 4, "budget": 0.03},
}
LOADS = (0.5, 2.0, 16.0)
"""The least load that is looked at, the first, and the most."""


def expected(requests: list[Request], chunk: int, most: int) -> dict[str, Any]:
    """What a run of them will have computed, roughly: prompts in whole chunks, answers side by side."""
    prefills = [
        (min(chunk, len(request.prompt) - start), min(start + chunk, len(request.prompt)))
        for request in requests
        for start in range(0, len(request.prompt), chunk)
    ]
    answers = sum(request.answer for request in requests)
    tokens = sum(request.answer * (len(request.prompt) + request.answer / 2) for request in requests)
    decodes = {"steps": answers / min(most, len(requests)), "requests": answers, "tokens": tokens}
    return {"prefills": prefills, "decodes": decodes}


def chosen(
    kernels: list[dict[str, Any]], part: str, model: Model, given: argparse.Namespace
) -> dict[str, str]:
    """How each store is to be used in a part."""
    if not kernels:
        return PLAIN
    runs = {}
    for name in WORKLOADS:
        options = options_of(name, PLAIN, given)
        runs[name] = expected(requests_of(model, options), options.chunk, options.most)
    # FlashAttention-3's tiles reach past a length, into memory whose numbers nobody looks after.
    ours = [entry for entry in kernels if entry["store"] == "vattn" and entry["decode_kernel"] != "fa3"]
    layers = model.config.layers
    theirs = [runs[part]] if part in runs else list(runs.values())
    paged = [entry for entry in kernels if entry["store"] == "paged"]
    if part == "tight":
        # There memory is what is short, and small pages waste the least.
        least = min(entry["page_tokens"] for entry in paged)
        paged = [entry for entry in paged if entry["page_tokens"] == least]
    return {
        "vattn": kernel_times.best(ours, "vattn", list(runs.values()), layers),
        "paged": kernel_times.best(paged, "paged", theirs, layers),
        "static": "static",
    }


def options_of(part: str, stores: dict[str, str], given: argparse.Namespace) -> argparse.Namespace:
    """What bench.py would have been called with."""
    changes = OPTIONS[part] | (TINY[part] if given.tiny else {})
    options = parser().parse_args(["--trace", str(given.traces / changes["trace"])])
    for name, value in changes.items():
        if name != "trace":
            setattr(options, name, value)
    options.stores = ",".join(stores.values())
    for name in ("rounds", "tiny", "layout", "model"):
        setattr(options, name, getattr(given, name))
    return options


# ---- agreement ----


def logits_of(
    model: Model, shape: Shape, choice: Choice, requests: list[Request], graphs: bool = True
) -> torch.Tensor:
    """The logits of every position of the answers, `[position, vocab]`, where all answers are given."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    number = {id(request): at for at, request in enumerate(requests)}

    def note(asked: list[Request], logits: torch.Tensor) -> None:
        for request, row in zip(asked, logits):
            found[number[id(request)], len(request.tokens)] = row.float().clone()

    store = choice.open(shape)
    try:
        kernels = {"prefill": choice.prefill, "decode": choice.decode}
        Engine(model, store, **kernels, chunk=512, graphs=graphs, on_logits=note).run(requests)
        return torch.stack([found[place] for place in sorted(found)])
    finally:
        store.close()
        del store
        forget(shape.device)


def differences(theirs: torch.Tensor, ours: torch.Tensor, noise: float) -> dict[str, Any]:
    """How far logits are apart, and whether the best tokens are the same where the margin is above a noise."""
    best = theirs.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > noise
    differ = theirs.argmax(-1) != ours.argmax(-1)
    apart = (theirs - ours).abs()
    return {
        "positions": len(theirs),
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "spread_of_logits": float(theirs.std()),
        "best_differs": int(differ.sum()),
        "clear": int(clear.sum()),
        "best_differs_where_clear": int((differ & clear).sum()),
    }


def agreement(model: Model, stores: dict[str, str], given: argparse.Namespace) -> dict[str, Any]:
    """The same requests with answers that are given, over every store. What kernels differ by anyhow is measured with
    two kernels over one store of pages, and what CUDA graphs change, over vattn without them."""
    draw = random.Random(2)
    longest = 512 if given.tiny else 8192
    shape = shape_of(model, argparse.Namespace(budget=0.05 if given.tiny else 24.0, longest=longest, most=8))

    def requests() -> list[Request]:
        draw.seed(2)
        made = []
        for at in range(8):
            tokens = [draw.randrange(model.config.vocab) for _ in range((at + 1) * (longest // 12) + 24)]
            made.append(Request(tokens[:-24], 24, forced=tokens[-24:]))
        return made

    read = {name: Choice.read(text, given.layout) for name, text in stores.items()}
    logits = {name: logits_of(model, shape, choice, requests()) for name, choice in read.items()}
    paged = read["paged"]
    other = (
        "reference" if given.tiny else "flashinfer" if paged.prefill == "flashinfer-fa2" else "flashinfer-fa2"
    )
    control = logits_of(model, shape, dataclasses.replace(paged, prefill=other), requests())
    launched = logits_of(model, shape, read["vattn"], requests(), graphs=False)
    noise = 2 * float((logits["paged"] - control).abs().max())
    return {
        "stores": stores,
        "noise": noise,
        "control": {"kernel": other} | differences(logits["paged"], control, noise),
        "without_graphs": differences(logits["vattn"], launched, noise),
        "to_paged": {
            name: differences(logits["paged"], found, noise)
            for name, found in logits.items()
            if name != "paged"
        },
    }


# ---- the load to compare at ----


def find_load(model: Model, options: argparse.Namespace, paged: str) -> dict[str, Any]:
    """The smallest load at which the median time to the first token is twice that of requests alone, within a
    sixteenth, of those between the ends of `LOADS`."""
    requests = requests_of(model, options)
    server = Server(model, shape_of(model, options), Choice.read(paged, options.layout), chunk=options.chunk)
    try:
        server.warm(requests[: options.warm_up])
        alone = []
        for request in fresh(requests, answer=1, arrival=0.0):
            server.engine.run([request])
            alone.append(request.times[0])
        unloaded = statistics.median(alone)
        tried: list[tuple[float, float]] = []

        def loaded(load: float) -> bool:
            served = fresh(requests)
            for request in served:
                request.arrival /= load
            found = server.serve(served)["ttft"]["p50"]
            tried.append((load, found))
            print(f"load {load:.2f}: TTFT p50 {found:.3f} s, {unloaded:.3f} alone", flush=True)
            return bool(found >= 2 * unloaded)

        least, high, most = LOADS
        if loaded(high):
            low = high / 2
            while low > least and loaded(low):
                low, high = low / 2, low
        else:
            low, high = high, 2 * high
            while high < most and not loaded(high):
                low, high = high, 2 * high
        while high - low > high / 16:
            middle = (low + high) / 2
            low, high = (low, middle) if loaded(middle) else (middle, high)
    finally:
        server.close()
    return {"unloaded_ttft": quantiles(alone), "tried": tried, "load": high}


# ---- all of it ----


def refuse_others(path: Path, known: dict[str, Any], now: dict[str, Any]) -> None:
    """A file is gone on with by what began it: the same machine, PyTorch, and options; only rounds may be more."""

    def began(found: dict[str, Any]) -> dict[str, Any]:
        said = {name: found[name] for name in ("device", "torch") if name in found} | found.get("options", {})
        return said | {"rounds": None}

    was, is_now = began(known), began(now)
    other = [
        f"{name} {told!r}, now {is_now.get(name)!r}" for name, told in was.items() if told != is_now.get(name)
    ]
    if other:
        raise SystemExit(f"{path} is of another run ({'; '.join(other)}): name another folder, or remove it")


def run_part(
    part: str, path: Path, model: Model, kernels: list[dict[str, Any]], given: argparse.Namespace
) -> None:
    """What one part finds, in its file; where that has a beginning, the rest."""
    known = read(path)
    rounds = known.get("options", {}).get("rounds", 0)
    if known.get("complete") and (part == "agreement" or rounds >= given.rounds):
        return
    stores = dict(chosen(kernels, part, model, given))
    head = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "processor",
        "torch": torch.__version__,
        "stores": stores,
        "complete": False,
    }
    if part == "agreement":
        write(path, head | agreement(model, stores, given) | {"complete": True})
        return
    if part == "online":
        # How much less could it be at the most? `paged` again, where prefill's attention takes a copy's time.
        stores["bound"] = str(dataclasses.replace(Choice.read(stores["paged"]), prefill="none"))
    options = options_of(part, stores, given)
    # There may be more than are asked for.
    options.rounds = max(options.rounds, rounds)
    if part == "online":
        head["search"] = known.get("search") or find_load(model, options, stores["paged"])
        options.load *= head["search"]["load"]
    refuse_others(path, known, head | {"options": plain(options)})
    # The search is not made again, whenever this is ended.
    write(path, known | head)
    found = compare(model, options, known.get("results"), lambda found: write(path, head | found))
    write(path, head | found | {"complete": True})


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts that are not there yet, and writes the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--traces", type=Path, required=True, help="the folder of the traces")
    made.add_argument("--parts", default=",".join(PARTS))
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--layout", default="sliced", type=lambda text: int(text) if text.isdigit() else text)
    made.add_argument("--tiny", action="store_true", help="a tiny model on the processor")
    made.add_argument("--model", type=Path, help="a Hugging Face folder; without, random weights")
    given = made.parse_args(arguments)
    parts = [part.strip() for part in given.parts.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        made.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    times = given.out / "kernels.json"
    if not given.tiny:
        # By themselves: their memory is gone when they end.
        for part, script, *options in (("check", check.__file__), ("kernels", kernel_times.__file__, times)):
            if part in parts:
                subprocess.run([sys.executable, script, *options], check=True)
    kernels = read(times)
    parts = [part for part in parts if part not in ("check", "kernels")]
    if parts and not given.tiny and not kernels.get("complete"):
        made.error(
            f"{times} is not there or not complete: the part kernels says how each cache is served best"
        )
    if parts:
        longest = max((TINY if given.tiny else OPTIONS)[part]["longest"] for part in OPTIONS)
        model = make_model(argparse.Namespace(tiny=given.tiny, model=given.model, longest=longest))
    for part in parts:
        with torch.inference_mode():
            run_part(part, given.out / f"{part}.json", model, kernels.get("entries", []), given)
        print(f"{part}: done", flush=True)
    report = [
        sys.executable,
        Path(__file__).with_name("report.py"),
        given.out,
        "--out",
        given.out / "page.html",
    ]
    return subprocess.run(report, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

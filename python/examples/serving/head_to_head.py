"""Everything that is compared, in one command on a machine with a GPU, and a page that shows it.

    python head_to_head.py OUT --traces FOLDER

| part | what is asked |
|---|---|
| `kernels` | what does attention cost over each cache? |
| `agreement` | do all caches give the same logits? |
| `long` | long prompts, all there at the start: throughput |
| `decode` | answers of hundreds of tokens, 64 at a time: throughput |
| `online` | arrivals as recorded, at the load at which `paged` takes twice as long to the first token as unloaded |
| `tight` | little memory: how many requests are under way at a time? |

Each part is a file in OUT, and is not run again where that is there; `--parts` names some. `paged` has, in each
part, the pages and kernels that were fastest for that part's work; `vattn` has one layout and one size of pages
throughout, `static` the contiguous kernels. `--tiny` runs all but `kernels` with a tiny model on the processor, to
show that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_times
import torch
from bench import Server, compare, fresh, make_model, parser, quantiles, requests_of, shape_of
from choices import Choice
from engine import Engine, Request
from model import Model
from store import Shape

PARTS = ["kernels", "agreement", "long", "decode", "online", "tight"]
PLAIN = {"vattn": "vattn", "paged": "paged", "static": "static"}

OPTIONS: dict[str, dict[str, Any]] = {
    "long": {
        "trace": "arxiv_long_offline.csv",
        "limit": 5,
        "longest": 131072,
        "most": 16,
        "budget": 96,
        "chunk": 8192,
        "warm_up": 1,
    },
    "decode": {
        "trace": "sync_vs_async.csv",
        "limit": 200,
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
LOADS = (0.5, 16.0)
PHASES = {
    "long": ["prefill"],
    "decode": ["decode"],
    "online": ["prefill", "decode"],
    "tight": ["prefill", "decode"],
}


def chosen(kernels: list[dict[str, Any]], part: str) -> dict[str, str]:
    """How each store is to be used in a part."""
    if not kernels:
        return PLAIN
    return {
        "vattn": kernel_times.best(kernels, "vattn", ["decode"]),
        "paged": kernel_times.best(kernels, "paged", PHASES[part]),
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
    options.rounds, options.tiny, options.layout = given.rounds, given.tiny, given.layout
    return options


# ---- agreement ----


def logits_of(model: Model, shape: Shape, choice: Choice, requests: list[Request]) -> torch.Tensor:
    """The logits of every position of the answers, `[position, vocab]`, where all answers are given."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    number = {id(request): at for at, request in enumerate(requests)}

    def note(asked: list[Request], logits: torch.Tensor) -> None:
        for request, row in zip(asked, logits):
            found[number[id(request)], len(request.tokens)] = row.float().clone()

    store = choice.open(shape)
    try:
        engine = Engine(model, store, prefill=choice.prefill, decode=choice.decode, chunk=512, on_logits=note)
        engine.run(requests)
        return torch.stack([found[place] for place in sorted(found)])
    finally:
        store.close()


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
    two kernels over one store of pages."""
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
    noise = 2 * float((logits["paged"] - control).abs().max())
    return {
        "stores": stores,
        "noise": noise,
        "control": {"kernel": other} | differences(logits["paged"], control, noise),
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
        for request in fresh(requests[:100], answer=1, arrival=0.0):
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

        low = high = LOADS[0]
        while not loaded(high) and high < LOADS[1]:
            low, high = high, 2 * high
        while high - low > high / 16:
            middle = (low + high) / 2
            low, high = (low, middle) if loaded(middle) else (middle, high)
    finally:
        server.close()
    return {"unloaded_ttft": quantiles(alone), "tried": tried, "load": high}


# ---- all of it ----


def run_part(
    part: str, model: Model, kernels: list[dict[str, Any]], given: argparse.Namespace
) -> dict[str, Any]:
    """What one part found."""
    if part == "agreement":
        return agreement(model, chosen(kernels, "long"), given)
    stores = chosen(kernels, part)
    options = options_of(part, stores, given)
    search = None
    if part == "online":
        search = find_load(model, options, stores["paged"])
        options.load = (options.load or 1.0) * search["load"]
    found = compare(model, options)
    return found | {"stores": stores} | ({"search": search} if search else {})


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts that are not there yet, and writes the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--traces", type=Path, required=True, help="the folder of the traces")
    made.add_argument("--parts", default=",".join(PARTS))
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--layout", default="sliced", type=lambda text: int(text) if text.isdigit() else text)
    made.add_argument("--tiny", action="store_true", help="a tiny model on the processor")
    made.add_argument("--model", type=Path, help="a Hugging Face folder; without, random weights")
    given = made.parse_args(arguments)
    parts = given.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        made.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    times = given.out / "kernels.json"
    # By itself: its memory is gone when it ends.
    if "kernels" in parts and not given.tiny and not times.exists():
        subprocess.run([sys.executable, kernel_times.__file__, times], check=True)
    kernels = json.loads(times.read_text())["entries"] if times.exists() else []
    wanted = [part for part in parts if part != "kernels" and not (given.out / f"{part}.json").exists()]
    if wanted:
        longest = max((TINY if given.tiny else OPTIONS)[part]["longest"] for part in OPTIONS)
        model = make_model(argparse.Namespace(tiny=given.tiny, model=given.model, longest=longest))
    for part in wanted:
        with torch.inference_mode():
            found = run_part(part, model, kernels, given)
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
        found["torch"] = torch.__version__
        (given.out / f"{part}.json").write_text(json.dumps(found, indent=1))
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

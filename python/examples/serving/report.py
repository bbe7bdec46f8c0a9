"""One HTML page from a folder of results: tables, and plots of throughput, latency and memory.

    python report.py RESULTS --out page.html

Beside what was measured it shows two things that are computed: what the kernels' own times predict, and, as a column
by itself, what `paged` would take with FlashAttention-3's own paged kernel for prefill, which no wheel contains.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import kernel_times
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plots
from matplotlib import ticker

# Text stays text: small, and a reader can find and copy it.
plots.rcParams["svg.fonttype"] = "none"

Runs = list[dict[str, Any]]

COLOURS = {"vattn": "#1b6ca8", "paged": "#c8553d", "static": "#7a7a7a", "bound": "#d9b44a"}

COLUMNS: list[tuple[str, Callable[[dict[str, Any]], float], str]] = [
    ("tokens/s", lambda run: run["tokens_per_second"], "{:,.0f}"),
    ("answer tokens/s", lambda run: run["answer_tokens_per_second"], "{:,.0f}"),
    ("TTFT p50, s", lambda run: run["ttft"]["p50"], "{:.3f}"),
    ("TTFT p99, s", lambda run: run["ttft"]["p99"], "{:.3f}"),
    ("time a token p50, ms", lambda run: 1e3 * run["tpot"].get("p50", math.nan), "{:.2f}"),
    ("time a token p99, ms", lambda run: 1e3 * run["tpot"].get("p99", math.nan), "{:.2f}"),
    ("mean active", lambda run: run["mean_active"], "{:.1f}"),
    ("preempted", lambda run: run["preempted"], "{:.0f}"),
    ("store's calls: waited for", lambda run: 100 * run["allocating_share"], "{:.3f} %"),
    ("store's calls: hidden", lambda run: 100 * run["allocating_hidden_share"], "{:.3f} %"),
    ("most memory, GiB", lambda run: run["most_held"] / 2**30, "{:.1f}"),
]

FA3_PAGED = {
    "sliced view": {2048: 1.09, 8192: 1.03, 32768: 1.04, 65536: 1.04},
    "page 16": {2048: 1.21, 8192: 1.20, 32768: 1.27, 65536: 1.29},
    "page 128": {2048: 1.10, 8192: 1.05, 32768: 1.12, 65536: 1.09},
}
"""FlashAttention-3's time for 2,048 new tokens by how many there are in all, against a tensor of its own for each
layer: over a view between other layers, and by its own paged kernel. Measured on an H200 with a build of the
sources of August 2026 (head dim 128, bf16, shuffled pages); the view's last is that of the one before."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: .5rem } caption { text-align: left; color: #555 }
"""


# ---- pieces of a page ----


def drawn(draw: Callable[[plots.Axes], None], title: str, x: str, y: str) -> str:
    """A plot as SVG."""
    figure, axes = plots.subplots(figsize=(5.2, 3.4), layout="constrained")
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plots.close(figure)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # In a page it needs no names of namespaces, and who drew it is no news.
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(' xmlns(:xlink)?="[^"]*"', "", drawing)
    return f"<figure>{drawing}</figure>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Its first column are names."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def of_store(results: dict[str, Runs], store: str) -> Runs:
    """A store's runs, whatever it was used with."""
    return next((runs for runs in results.values() if short(runs[0]) == store), [])


def middle(runs: Runs, of: Callable[[dict[str, Any]], float]) -> float:
    """The median of the rounds."""
    return statistics.median(map(of, runs))


def label(run: dict[str, Any]) -> str:
    """A store with its kernels and pages."""
    pages = f", pages of {run['page_tokens']}" if run["page_tokens"] else ""
    bound = "bound: " if short(run) == "bound" else ""
    return f"{bound}{run['store']} ({run['prefill_kernel']}, {run['decode_kernel']}{pages})"


def short(run: dict[str, Any]) -> str:
    """A store; or the bound, where prefill's attention took a copy's time."""
    return "bound" if run["prefill_kernel"] == "none" else run["store"]


def bars(results: dict[str, Runs]) -> Callable[[plots.Axes], None]:
    """Each store's median throughput, with the range of its rounds."""

    def draw(axes: plots.Axes) -> None:
        for runs in results.values():
            found = [run["tokens_per_second"] for run in runs]
            at, name = statistics.median(found), short(runs[0])
            axes.bar(
                name, at, color=COLOURS.get(name), yerr=[[at - min(found)], [max(found) - at]], capsize=4
            )

    return draw


def shares(results: dict[str, Runs], of: str, scale: float) -> Callable[[plots.Axes], None]:
    """What share of the requests had at most so much, over all rounds."""

    def draw(axes: plots.Axes) -> None:
        for runs in results.values():
            name = short(runs[0])
            found = sorted(scale * sample for run in runs for sample in run["samples"][of])
            share = [(at + 1) / len(found) for at in range(len(found))]
            axes.plot(found, share, label=name, color=COLOURS.get(name))
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        few = high < 5 * low
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6) if few else ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())

    return draw


def over_time(results: dict[str, Runs], column: int, scale: float) -> Callable[[plots.Axes], None]:
    """The last round of each store."""

    def draw(axes: plots.Axes) -> None:
        for runs in results.values():
            name, moments = short(runs[0]), runs[-1]["samples"]["moments"]
            at, what = [entry[0] for entry in moments], [entry[column] / scale for entry in moments]
            axes.plot(at, what, label=name, color=COLOURS.get(name))

    return draw


# ---- what is computed ----


def fa3_ratio(page: str, total: int) -> float:
    """FlashAttention-3 by its own paged kernel against itself over our view, for 2,048 new tokens."""
    known = sorted(FA3_PAGED[page])
    paged, view = (
        kernel_times.interpolated(known, total, FA3_PAGED[what].__getitem__) for what in (page, "sliced view")
    )
    return paged / view


def computed(told: dict[str, Any], kernels: Runs) -> dict[str, float]:
    """Of the median run of `paged`: what attention came to by the kernels' times, the seconds that `vattn` should
    take, and those of `paged` with FlashAttention-3's own paged prefill."""
    results, layers = told["results"], told["model"]["layers"]
    ours, theirs = of_store(results, "vattn"), of_store(results, "paged")
    if not ours or not theirs:
        return {}

    vattn, paged = kernel_times.find(kernels, ours[0]), kernel_times.find(kernels, theirs[0])
    if not vattn or not paged:
        return {}
    our_seconds = statistics.median_low(run["seconds"] for run in ours)
    seconds = statistics.median_low(run["seconds"] for run in theirs)
    run = next(run for run in theirs if run["seconds"] == seconds)
    their_prefill, their_decode = paged.attention(run, layers)
    our_prefill, our_decode = vattn.attention(run, layers)
    predicted = seconds - their_prefill - their_decode + our_prefill + our_decode
    measured = seconds / our_seconds
    found = {
        "paged_seconds": seconds,
        "paged_prefill_attention": their_prefill,
        "paged_decode_attention": their_decode,
        "vattn_prefill_attention": our_prefill,
        "vattn_decode_attention": our_decode,
        "predicted_ratio": seconds / predicted,
        "measured_ratio": measured,
        "measured_to_predicted": measured * predicted / seconds,
    }
    for page in ("page 16", "page 128"):
        attention = sum(vattn.prefill(new, total) * fa3_ratio(page, total) for new, total in run["prefills"])
        would = seconds - their_prefill + layers * attention / 1e6
        found[f"FA3, {page}: seconds"] = would
        found[f"FA3, {page}: ratio"] = would / our_seconds
    return found


def compared(told: dict[str, Any], kernels: Runs) -> list[str]:
    """A workload's medians of `vattn` by those of `paged`, and what the kernels say; a cell each."""
    ours, theirs = of_store(told["results"], "vattn"), of_store(told["results"], "paged")

    def ratio(of: Callable[[dict[str, Any]], float]) -> str:
        at = middle(theirs, of) if ours and theirs else 0.0
        return f"{middle(ours, of) / at:.3f}" if at else ""

    # Where requests arrive one by one, those times are not the run's.
    found = {} if told.get("search") else computed(told, kernels)
    known = [found.get(name) for name in ("predicted_ratio", "FA3, page 128: ratio")]
    said = [f"{value:.3f}" if value else "" for value in known]
    return [ratio(lambda run: run["tokens_per_second"]), *said, *(ratio(of) for _, of in AGAINST)]


AGAINST: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
    ("TTFT p50", lambda run: run["ttft"]["p50"]),
    ("time a token p50", lambda run: run["tpot"].get("p50", 0.0)),
    ("mean active", lambda run: run["mean_active"]),
    ("most memory", lambda run: run["most_held"]),
]
"""What is compared beside the throughput."""


# ---- parts ----


def part_summary(told: dict[str, dict[str, Any]], kernels: Runs) -> str:
    """All workloads, a line each."""
    head = [
        "vattn by paged",
        "tokens/s",
        "as the kernels say",
        "to paged with FA3's own pages of 128 (computed)",
        *(name for name, _ in AGAINST),
    ]
    rows = [[name, *compared(found, kernels)] for name, found in told.items() if "results" in found]
    return table("Ratios of medians", head, rows)


def part_kernels(results: dict[str, Any]) -> str:
    """Each kernel's times."""
    entries = results["entries"]
    first = next(entry for entry in entries if entry["store"] == "vattn")
    blocks = []
    for phase in ("prefill", "decode"):
        shapes = [tuple(each.values())[:2] for each in first[phase]]
        rows, seen = [], set()
        for entry in entries:
            pages = "" if entry[f"{phase}_kernel"] == "fa3" else f", pages of {entry['page_tokens']}"
            name = f"{entry['store']}: {entry[f'{phase}_kernel']}{pages}"
            if entry[phase] and name not in seen:
                seen.add(name)
                rows.append([name, *(f"{each['us']:,.0f}" for each in entry[phase])])
        what = "new / in all" if phase == "prefill" else "requests x tokens"
        sign = " / " if phase == "prefill" else " x "
        head = [what, *(sign.join(f"{number:,}" for number in shape) for shape in shapes)]
        blocks.append(table(f"{phase}: microseconds a layer", head, rows))
    fits = ", ".join(
        f"{entry['choice']} {kernel_times.Times(entry).decode_error:.0%}"
        for entry in entries
        if entry["decode"]
    )
    told = "A step of decodes is told by its requests and tokens, which misses the measured times by up to: "
    return "".join([*blocks, f"<p>{html.escape(told + fits)}.</p>"])


def part_agreement(told: dict[str, Any]) -> str:
    """How far logits are apart."""
    head = ["", "positions", "largest", "mean", "best differs", "clear of noise", "of these differ"]
    keys = ["positions", "largest", "mean", "best_differs", "clear", "best_differs_where_clear"]
    pairs = {f"{name} to paged": found for name, found in told["to_paged"].items()}
    pairs[f"paged to itself with {told['control']['kernel']}"] = told["control"]
    if launched := told.get("without_graphs"):
        pairs["vattn to itself without CUDA graphs"] = launched
    rows = [[name, *(f"{found[key]:.4g}" for key in keys)] for name, found in pairs.items()]
    return table(f"Logits of given answers; the noise is {told['noise']:.3g}", head, rows)


def part_runs(told: dict[str, Any], kernels: Runs) -> str:
    """One workload's tables and plots."""
    results = told["results"]
    rounds = " to ".join(map(str, sorted({len(runs) for runs in results.values()})))
    options = ", ".join(
        f"{name.replace('_', ' ')} {Path(value).name if name == 'trace' else value}"
        for name, value in told["options"].items()
        if value not in (None, False) and name not in ("json", "stores", "model")
    )
    rows = [
        [label(runs[0]), *(form.format(middle(runs, of)) for _, of, form in COLUMNS)]
        for runs in results.values()
    ]
    head = ["cache (prefill, decode)", *(name for name, _, _ in COLUMNS)]
    blocks = [f"<p>{html.escape(options)}</p>", table(f"Medians of {rounds} rounds", head, rows)]
    if search := told.get("search"):
        tried = ", ".join(f"{load:.2f}: {found:.3f}" for load, found in sorted(search["tried"]))
        alone = search["unloaded_ttft"]["p50"]
        blocks.append(f"<p>Median TTFT of requests alone {alone:.3f} s; of paged by load {tried}.</p>")
    elif found := computed(told, kernels):
        rows = [[name.replace("_", " "), f"{value:.3f}"] for name, value in found.items()]
        how = (
            "Computed from the kernels' times, seconds and ratios. Parts of several prompts in one step count each by "
            "itself. FlashAttention-3's own paging is by its ratios for 2,048 new tokens."
        )
        blocks.append(f"<p>{how}</p>{table('', ['', ''], rows)}")
    blocks += [
        drawn(bars(results), "Throughput", "", "tokens/s"),
        drawn(shares(results, "ttft", 1.0), "Time to the first token", "s", "share of requests"),
        drawn(shares(results, "tpot", 1e3), "Time for each further token", "ms", "share of requests"),
        drawn(over_time(results, 2, 2**30), "Memory held", "s", "GiB"),
        drawn(over_time(results, 1, 1), "Requests with memory", "s", "requests"),
    ]
    return "".join(blocks)


def result(path: Path) -> dict[str, Any]:
    """A part's file; nothing where it is none, or has no run yet."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"entries", "to_paged", "results"} & found.keys():
        return {}
    if "results" in found:
        found["results"] = {name: runs for name, runs in found["results"].items() if runs}
    return found if found.get("results", True) else {}


def page(folder: Path) -> str:
    """All of it."""
    # The runs first, then what they rest on.
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem in ("agreement", "kernels"), path.stem))
    told = {path.stem: found for path in paths if (found := result(path))}
    kernels = told.get("kernels", {}).get("entries", [])
    sections = [part_summary(told, kernels)]
    for name, found in told.items():
        if "entries" in found:
            block = part_kernels(found)
        elif "to_paged" in found:
            block = part_agreement(found)
        else:
            block = part_runs(found, kernels)
        whole = "" if found.get("complete") else " (not complete)"
        sections.append(f"<h2>{html.escape(name)}{whole}</h2>{block}")
    devices = ", ".join(sorted({found["device"] for found in told.values() if "device" in found}))
    return (
        f"<!doctype html><meta charset='utf-8'><title>One engine, three KV caches</title><style>{STYLE}</style>"
        f"<h1>One engine, three KV caches</h1><p>{html.escape(devices)}</p>{''.join(sections)}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Reads the folder and writes the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, help="a folder of JSON files")
    made.add_argument("--out", type=Path, default=Path("page.html"))
    options = made.parse_args(arguments)
    options.out.write_text(page(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

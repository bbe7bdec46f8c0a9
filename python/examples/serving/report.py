"""One HTML page from the results of runs: a table, and plots of throughput, latency and memory.

python report.py results/*.json --out page.html
"""

from __future__ import annotations

import argparse
import html
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plots  # noqa: E402

COLOURS = {"vattn": "#1b6ca8", "paged": "#c8553d", "static": "#7a7a7a"}

COLUMNS: list[tuple[str, Callable[[dict], float], str]] = [
    ("tokens/s", lambda run: run["tokens_per_second"], "{:,.0f}"),
    ("answer tokens/s", lambda run: run["answer_tokens_per_second"], "{:,.0f}"),
    ("TTFT p50, s", lambda run: run["ttft"]["p50"], "{:.3f}"),
    ("TTFT p99, s", lambda run: run["ttft"]["p99"], "{:.3f}"),
    ("time a token p50, ms", lambda run: 1e3 * run["tpot"]["p50"], "{:.2f}"),
    ("time a token p99, ms", lambda run: 1e3 * run["tpot"]["p99"], "{:.2f}"),
    ("mean active", lambda run: run["mean_active"], "{:.1f}"),
    ("preempted", lambda run: run["preempted"], "{:.0f}"),
    ("allocation", lambda run: 100 * run["allocating_share"], "{:.3f} %"),
    ("most memory, GiB", lambda run: run["most_held"] / 2**30, "{:.1f}"),
]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right } td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: .5rem } caption { text-align: left; color: #555 }
"""


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
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"


def bars(results: dict[str, list[dict]]) -> Callable[[plots.Axes], None]:
    """Each store's median throughput, with the range of its rounds."""

    def draw(axes: plots.Axes) -> None:
        for name, runs in results.items():
            found = [run["tokens_per_second"] for run in runs]
            middle = statistics.median(found)
            axes.bar(
                name,
                middle,
                color=COLOURS.get(name),
                yerr=[[middle - min(found)], [max(found) - middle]],
                capsize=4,
            )

    return draw


def shares(results: dict[str, list[dict]], of: str, scale: float) -> Callable[[plots.Axes], None]:
    """What share of the requests had at most so much, over all rounds."""

    def draw(axes: plots.Axes) -> None:
        for name, runs in results.items():
            found = sorted(scale * sample for run in runs for sample in run["samples"][of])
            axes.plot(
                found,
                [(at + 1) / len(found) for at in range(len(found))],
                label=name,
                color=COLOURS.get(name),
            )
        axes.set_xscale("log")

    return draw


def over_time(results: dict[str, list[dict]], column: int, scale: float) -> Callable[[plots.Axes], None]:
    """The last round of each store."""

    def draw(axes: plots.Axes) -> None:
        for name, runs in results.items():
            memory = runs[-1]["samples"]["memory"]
            axes.plot(
                [entry[0] for entry in memory],
                [entry[column] / scale for entry in memory],
                label=name,
                color=COLOURS.get(name),
            )

    return draw


def table(results: dict[str, list[dict]]) -> str:
    """Medians of the rounds."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _, _ in COLUMNS)
    rows = []
    for name, runs in results.items():
        kernels = f"{name} ({runs[0]['prefill_kernel']}, {runs[0]['decode_kernel']})"
        cells = "".join(
            f"<td>{form.format(statistics.median(map(of, runs)))}</td>" for _, of, form in COLUMNS
        )
        rows.append(f"<tr><td>{html.escape(kernels)}</td>{cells}</tr>")
    rounds = max(len(runs) for runs in results.values())
    return (
        f"<table><caption>Medians of {rounds} rounds; in brackets the kernels of prefill and decode.</caption>"
        f"<tr><th>cache</th>{head}</tr>{''.join(rows)}</table>"
    )


def section(title: str, told: dict) -> str:
    """One run's part of the page."""
    results = told["results"]
    options = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in told["options"].items()
        if value not in (None, False) and name not in ("json", "stores")
    )
    pictures = [
        drawn(bars(results), "Throughput", "", "tokens/s"),
        drawn(shares(results, "ttft", 1.0), "Time to the first token", "s", "share of requests"),
        drawn(shares(results, "tpot", 1e3), "Time for each further token", "ms", "share of requests"),
        drawn(over_time(results, 2, 2**30), "Memory held", "s", "GiB"),
        drawn(over_time(results, 1, 1), "Requests with memory", "s", "requests"),
    ]
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(options)}</p>{table(results)}{''.join(pictures)}"


def page(sections: Iterable[str]) -> str:
    """All of it."""
    return (
        f"<!doctype html><meta charset='utf-8'><title>One engine, three KV caches</title><style>{STYLE}</style>"
        f"<h1>One engine, three KV caches</h1>{''.join(sections)}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Reads the files and writes the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, nargs="+")
    made.add_argument("--out", type=Path, default=Path("page.html"))
    options = made.parse_args(arguments)
    options.out.write_text(page(section(path.stem, json.loads(path.read_text())) for path in options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

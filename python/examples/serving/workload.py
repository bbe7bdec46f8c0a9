"""Requests from the traces: how long prompts and answers are, and when they arrive.

The prompts' tokens are drawn at random: traces tell lengths, not words.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from engine import Request


def read(path: Path) -> Iterator[tuple[float, int, int]]:
    """Arrival in seconds after the first, tokens of the prompt, tokens of the answer. A trace without arrivals has
    all of its requests at the start."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        fields = set(rows.fieldnames or ())
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= fields:
            first = None
            for row in rows:
                # Seven digits of fraction are one more than Python reads.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                first = first or at
                yield (at - first).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"])
        elif {"num_prefill_tokens", "num_decode_tokens"} <= fields:
            for row in rows:
                yield 0.0, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])
        else:
            raise ValueError(
                f"{path} has the fields {sorted(fields)}, which are those of no trace that is known here"
            )


def requests(
    path: Path,
    *,
    vocab: int,
    longest: int,
    limit: int | None = None,
    skip: int = 0,
    load: float = 1.0,
    shorten: float = 1.0,
    seed: int = 0,
) -> list[Request]:
    """The trace's requests of at most `longest` tokens, from number `skip` on.

    `load` divides the times between arrivals, `shorten` the lengths of prompts (for a model of a shorter context).
    """
    draw = random.Random(seed)
    found: list[Request] = []
    for number, (arrival, prompt, answer) in enumerate(read(path)):
        if number < skip:
            continue
        prompt = max(1, round(prompt / shorten))
        if prompt + answer > longest or answer < 1:
            continue
        if limit is not None and len(found) >= limit:
            break
        tokens = [draw.randrange(vocab) for _ in range(prompt)]
        found.append(Request(tokens, answer, arrival=arrival / load))
    if found:
        first = found[0].arrival
        for request in found:
            request.arrival -= first
    return found

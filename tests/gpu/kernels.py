#!/usr/bin/env python3
"""How many tokens past a sequence's length must an attention kernel find memory behind?

    kernels.py OUT [--jobs 6] [--seconds 230]     on a machine with a GPU: writes OUT/kernels.md and .json
    kernels.py --self-test                        anywhere: the bridge alone, on the host, with NumPy

Each kernel runs over a cache in which exactly the bytes that its lengths need are mapped: granule by
granule, all of it NaN but for the live tokens. A kernel that touches a byte too many faults, in a child
process of its own; one that uses a number too many is wrong. Control reads prove that the trap works.
What is found is compared with EXPECTED, and a contradiction is a failure. A kernel that is not installed
is a SKIP, and with VATTN_REQUIRE_GPU=1 a failure.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from children import Children

ALL_DIMS = ((64, 64), (128, 128), (256, 256))
LAYOUTS = ("sliced", "per-layer", "sliced-interleaved")


def fa3_tile(key_dim, value_dim, causal):
    """FlashAttention-3's tiles along the keys for 16-bit elements on Hopper (`hopper/tile_size.h` in
    https://github.com/Dao-AILab/flash-attention). One new token counts as not causal."""
    if key_dim <= 64:
        return 128 if causal else 192
    if key_dim <= 128:
        return 128 if causal else 176
    if key_dim <= 192:
        return 128 if value_dim <= 128 else 112
    return 80


# For each kernel: what is called, the work it is tried with, and the smallest `tile_tokens` with which it
# runs, as a function of the width of keys and values and of whether the mask is causal. 1: it touches
# nothing past the length.
EXPECTED = {
    "torch-varlen": ("PyTorch FlashAttention, variable lengths", "packed row, cumulative starts, `seqused_k`",
                     ("decode", "extend", "extend, not causal"), lambda *_: 1),
    "sdpa-flash": ("PyTorch SDPA, flash", "each slot's exact view", ("decode", "prefill"), lambda *_: 1),
    "sdpa-cudnn": ("PyTorch SDPA, cuDNN", "each slot's exact view", ("decode", "prefill"), lambda *_: 1),
    "sdpa-efficient": ("PyTorch SDPA, efficient", "each slot's exact view", ("decode", "prefill"), lambda *_: 1),
    "sdpa-math": ("PyTorch SDPA, math", "each slot's exact view", ("decode", "prefill"), lambda *_: 1),
    "fa3-exact": ("FlashAttention-3", "each slot's exact view", ("decode", "extend", "extend, not causal"),
                  lambda *_: 1),
    "fa3-batch": ("FlashAttention-3", "`[slot, token, head, dim]`, `cache_seqlens`",
                  ("decode", "extend", "extend, not causal"), fa3_tile),
    "flashinfer-decode": ("FlashInfer decode", "identity page table", ("decode",), lambda *_: 1),
    "flashinfer-decode-tc": ("FlashInfer decode, tensor cores", "identity page table", ("decode",), lambda *_: 1),
    "flashinfer-prefill-fa2": ("FlashInfer prefill, FA2", "identity page table", ("decode", "extend"), lambda *_: 1),
    "flashinfer-prefill-fa3": ("FlashInfer prefill, FA3", "identity page table", ("decode", "extend"), lambda *_: 1),
}
# Whether the numbers that lie past the length may be NaN; None: not asserted.
NAN_IGNORED = {kernel: None if kernel == "fa3-batch" else True for kernel in EXPECTED}
# What these kernels may refuse to run.
MAY_REFUSE = {("sdpa-cudnn", 256)}
# FlashInfer is compiled for each head dim where it is first used, which takes a minute.
ONE_DIM = {kernel for kernel in EXPECTED if kernel.startswith("flashinfer")}
FIRST = sorted(ONE_DIM)
TILES = range(16, 257, 16)


def expected_tile(case):
    causal = case.mode in ("extend", "prefill")
    return EXPECTED[case.kernel][3](case.key_dim, case.value_dim, causal)


def dims_of(kernel, layout):
    if kernel in ONE_DIM or layout != "sliced":
        return ((128, 128),)
    return ALL_DIMS + (((192, 128),) if kernel.startswith("fa3") else ())


def must_run():
    """A group of cases for each kernel and layout, with the expected tile."""
    from dataclasses import replace
    from kernel_trials import Case

    groups = []
    for kernel in FIRST + [kernel for kernel in EXPECTED if kernel not in FIRST]:
        by_layout = []
        for layout in LAYOUTS:
            cases = [Case(kernel, layout, *dims, mode) for dims in dims_of(kernel, layout)
                     for mode in EXPECTED[kernel][2]]
            by_layout.append([replace(case, tile=expected_tile(case)) for case in cases])
        # Starting FlashInfer takes longer than its trials.
        groups += [sum(by_layout, [])] if kernel in ONE_DIM else by_layout
    return groups


def must_fault():
    """Reads past the end, and the whole-batch kernel with tiles that are too small: a kernel whose tile is
    B runs with multiples of B alone, so what fails with B over each of its primes needs B."""
    from kernel_trials import Case

    cases = [Case("control", layout, 128, 128, "decode", quick=True) for layout in LAYOUTS]
    cases.append(Case("fa3-batch", "per-layer", 128, 128, "decode", quick=True))
    for dims in dims_of("fa3-batch", "sliced"):
        cases.append(Case("fa3-batch", "sliced", *dims, "decode", quick=True))
        for mode in EXPECTED["fa3-batch"][2]:
            tile = expected_tile(Case("fa3-batch", "sliced", *dims, mode))
            for prime in primes(tile):
                cases.append(Case("fa3-batch", "sliced", *dims, mode, tile // prime, quick=True))
    return cases


def outcome_of(answer):
    """Some faults take the process along."""
    from kernel_trials import FAULTS

    died = answer.get("died", "")
    return answer.get("outcome", "fault" if any(word in died for word in FAULTS) else "died")


def primes(number):
    return [prime for prime in range(2, number + 1)
            if number % prime == 0 and all(prime % smaller for smaller in range(2, prime))]


class Findings:
    """What was found, and what of it contradicts what was expected."""

    def __init__(self):
        self.trials, self.wrong, self.skipped = [], [], {}
        self.smallest = {}

    def note(self, case, answer):
        self.trials.append({**case.__dict__, **answer})

    def contradict(self, case, text):
        self.wrong.append(f"{case.kernel}, {case.layout}, head dim {case.dims}, {case.mode}, tile {case.tile}: {text}")
        print(f"CONTRADICTION {self.wrong[-1]}", flush=True)

    def judge_run(self, case, answer):
        """A case that must run. Answers whether a larger tile should be looked for."""
        outcome = outcome_of(answer)
        if outcome == "missing":
            if case.kernel not in self.skipped:
                print(f"SKIP {case.kernel}: {answer['detail'].strip().splitlines()[-1]}", flush=True)
            self.skipped[case.kernel] = answer["detail"]
        elif outcome == "refused" and (case.kernel, case.key_dim) in MAY_REFUSE:
            pass
        elif outcome != "pass":
            detail = answer.get("detail") or answer.get("died") or f"relative error {answer.get('error')}"
            self.contradict(case, f"{outcome}, expected to run: {detail}")
        elif NAN_IGNORED[case.kernel] is not None and answer["nan_ignored"] != NAN_IGNORED[case.kernel]:
            self.contradict(case, f"NaN past the length is {'' if answer['nan_ignored'] else 'not '}ignored")
        return outcome == "fault"


def run_groups(children, groups, findings, seconds):
    """Runs groups of cases; what comes after a fault is run again in another child. Answers what faulted."""
    from kernel_trials import run_cases

    faulted = []
    while groups:
        again = []
        for group, answers in children.run(run_cases, groups, seconds):
            if isinstance(answers, dict):
                # It may have been the first case or the last: alone, each tells for itself.
                again += [[case] for case in group] if len(group) > 1 else []
                answers = [answers] if len(group) == 1 else []
            else:
                again += [group[len(answers):]] if len(answers) < len(group) else []
            for case, answer in zip(group, answers):
                findings.note(case, answer)
                if findings.judge_run(case, answer):
                    faulted.append(case)
        groups = [group for group in again if group and group[0].kernel not in findings.skipped]
    return faulted


def run_faults(children, findings, seconds):
    """What must fault, and between it what must not, as proof that a fault stays where it is."""
    from kernel_trials import Case, run_cases

    sentinel = Case("torch-varlen", "sliced", 128, 128, "decode")
    cases = [case for case in must_fault() if case.kernel not in findings.skipped]
    tasks = []
    for number, case in enumerate(cases):
        tasks.append([case])
        if number % 8 == 4:
            tasks.append([sentinel])
    passed = []
    for [case], answers in children.run(run_cases, tasks, seconds):
        answer = answers[0] if isinstance(answers, list) else answers
        findings.note(case, answer)
        outcome = outcome_of(answer)
        if case is sentinel:
            findings.judge_run(case, answer)
        elif outcome == "missing":
            findings.skipped[case.kernel] = answer["detail"]
        elif outcome != "fault":
            findings.contradict(case, f"{outcome}, expected to fault: {answer.get('detail') or answer.get('died', '')}")
            if case.kernel != "control":
                passed.append(case)
    return passed


def search(children, findings, cases, seconds):
    """The smallest tile with which a case runs, where that is not the expected one."""
    from dataclasses import replace
    from kernel_trials import run_cases

    seen = {replace(case, layout="sliced", tile=1, quick=True) for case in cases if case.kernel != "control"}
    tasks = [[replace(case, tile=tile)] for case in sorted(seen, key=str) for tile in (1, *TILES)]
    runs = {}
    for [case], answers in children.run(run_cases, tasks, seconds):
        answer = answers[0] if isinstance(answers, list) else answers
        findings.note(case, answer)
        if answer.get("outcome") == "pass":
            runs.setdefault(replace(case, tile=1), []).append(case.tile)
    for case in seen:
        least = min(runs.get(case, []), default=None)
        findings.smallest[case.kernel, case.dims, case.mode] = least
        print(f"FOUND {case.kernel}, head dim {case.dims}, {case.mode}: smallest tile {least}", flush=True)


def tile_text(tile):
    if tile is None:
        return "?"
    return "none" if tile == 1 else f"to a multiple of {tile}"


def verdict(answers, key):
    told = {answer[key] for answer in answers if key in answer}
    return "–" if not told else "yes" if told == {True} else "no" if told == {False} else "not always"


def table(findings):
    """A row for each kernel and kind of work."""
    rows = []
    for kernel, (name, over, modes, _) in EXPECTED.items():
        for mode in modes:
            trials = [trial for trial in findings.trials if (trial["kernel"], trial["mode"]) == (kernel, mode)]
            ran = [trial for trial in trials if trial.get("outcome") == "pass"]
            tiles = {}
            for trial in ran:
                dims = trial["key_dim"] if trial["key_dim"] == trial["value_dim"] else (
                    f"{trial['key_dim']}/{trial['value_dim']}")
                tiles[str(dims)] = findings.smallest.get((kernel, str(dims), mode), trial["tile"])
            by_tile = {}
            for dims, tile in sorted(tiles.items(), key=lambda item: [int(part) for part in item[0].split("/")]):
                by_tile.setdefault(tile, []).append(dims)
            past = "; ".join(f"{tile_text(tile)} (head dim {', '.join(dims)})" for tile, dims in by_tile.items())
            beyond = [trial for trial in ran if trial.get("slots_with_past")]
            errors = [trial["error"] for trial in ran if trial.get("error") is not None]
            row = {
                "kernel": name, "over": over, "work": mode, "past": past or "not run",
                "layouts": ", ".join(sorted({trial["layout"] for trial in ran}, key=LAYOUTS.index)) or "–",
                "nan": verdict(beyond, "nan_ignored"), "finite": verdict(beyond, "finite_ignored"),
                "error": f"{max(errors):.4f}" if errors else "–",
            }
            alike = [other for other in rows[-1:] if all(
                other[key] == row[key] for key in row if key not in ("work", "error"))]
            for other in alike:
                other["work"] += f"; {mode}"
                other["error"] = max(other["error"], row["error"])
            rows += [] if alike else [row]
    return rows


def markdown(rows, environment):
    heads = {"kernel": "kernel", "over": "called over", "work": "work",
             "past": "backed past the length", "nan": "NaN there is ignored", "finite": "finite numbers there are",
             "layouts": "layouts", "error": "relative error"}
    lines = ["| " + " | ".join(heads.values()) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row[key] for key in heads) + " |" for row in rows]
    on = ", ".join(f"{name} {value}" for name, value in environment.items() if value)
    return "\n".join(lines) + f"\n\nMeasured on: {on}.\n"


def prove(out, jobs, limit):
    began = time.monotonic()
    required = os.environ.get("VATTN_REQUIRE_GPU") == "1"
    out.mkdir(parents=True, exist_ok=True)
    children = Children(tempfile.mkdtemp(prefix="vattn-kernels-"), jobs, began + limit)
    try:
        import kernel_trials
    except ImportError as error:
        print(f"SKIP all kernels: {error}")
        return 1 if required else 0
    try:
        # Before the fork, so that no child has to.
        import fa3_fwd_interface  # noqa: F401
    except (ImportError, OSError):
        pass
    [(_, environment)] = children.run(kernel_trials.environment, [None], 120)
    if "died" in environment:
        print(f"SKIP all kernels: no GPU answers\n{environment['died']}")
        return 1 if required else 0
    print(json.dumps(environment), flush=True)

    findings = Findings()
    suspects = run_groups(children, must_run(), findings, 200)
    print(f"what must run: {time.monotonic() - began:.0f} s", flush=True)
    suspects += run_faults(children, findings, 60)
    print(f"what must fault: {time.monotonic() - began:.0f} s", flush=True)
    if suspects:
        search(children, findings, suspects, 60)

    rows = table(findings)
    text = markdown(rows, environment)
    (out / "kernels.md").write_text(text)
    (out / "kernels.json").write_text(json.dumps({
        "environment": environment, "seconds": round(time.monotonic() - began), "table": rows,
        "contradictions": findings.wrong, "skipped": findings.skipped, "trials": findings.trials}, indent=1))
    print(text)
    counts = {}
    for trial in findings.trials:
        outcome = outcome_of(trial)
        counts[outcome] = counts.get(outcome, 0) + 1
    print(f"{len(findings.trials)} trials in {time.monotonic() - began:.0f} s: {counts}; "
          f"{len(findings.wrong)} contradictions, skipped: {', '.join(sorted(findings.skipped)) or 'none'}")
    return 1 if findings.wrong or (required and findings.skipped) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="the folder for kernels.md and kernels.json")
    parser.add_argument("--jobs", type=int, default=6, help="children at a time")
    parser.add_argument("--seconds", type=float, default=230, help="when to give up")
    parser.add_argument("--self-test", action="store_true", help="test the bridge on the host")
    arguments = parser.parse_args()
    if arguments.self_test:
        import self_test
        return self_test.main()
    if arguments.out is None:
        parser.error("OUT is missing: the folder for the results")
    return prove(arguments.out, arguments.jobs, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())

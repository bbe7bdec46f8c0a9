"""Each example runs, and prints what its last line here says. Those that need more than NumPy have tests of
their own."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from world import ROOT

EXAMPLES = {
    "numpy_ten_lines.py": r"given back, 0 bytes are left",
    "engine_loop.py": r"60 requests in \d+ steps, \d+ preempted, [1-9]\d* slots adopted with their memory",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    path = ROOT / "python" / "examples" / name
    done = subprocess.run([sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(EXAMPLES[name], done.stdout.splitlines()[-1])


def test_the_bench_runs() -> None:
    path = ROOT / "python" / "benches" / "step.py"
    done = subprocess.run([sys.executable, path, "16", "50"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "a Batch" in done.stdout

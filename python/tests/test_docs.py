"""What the documents show of Python runs, and prints what they say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from world import ROOT

import vattn


@pytest.mark.parametrize("name", ["README.md", "python/README.md"])
def test_the_programs_of_a_page_run(name: str) -> None:
    page = (ROOT / name).read_text()
    programs = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", page, re.DOTALL | re.MULTILINE)
    assert programs
    for program, output in programs:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert not output or done.stdout == output


def test_the_program_of_the_package_runs() -> None:
    text = vattn.__doc__ or ""
    program = "".join(line[4:] + "\n" for line in text.splitlines() if line.startswith("    "))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

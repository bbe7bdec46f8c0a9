"""What runs with PyTorch and transformers in a process of its own: examples, measurements, and what is said where
either is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from world import ROOT

PYTHON = ROOT / "python"
EXAMPLES = {
    "sdpa_torch.py": r"attention in 4 layers against float32: relative error at most 0\.00\d\d",
    "generate.py": r"4 beams, 50 tokens, [\d.]+ MiB; all of it is given back now",
    "flash_attention_3.py": r"SKIP: .*|against float32: relative error at most 0\.00\d\d",
    "flashinfer_identity.py": r"SKIP: .*|against float32: relative error at most 0\.00\d\d",
}


def run(*command: object) -> str:
    """What a program prints, which has to end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"SKIP: {module} is not installed")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    need("torch", *(["transformers"] if name == "generate.py" else []))
    out = run("-W", "error::ResourceWarning", PYTHON / "examples" / name)
    assert re.fullmatch(EXAMPLES[name], out.splitlines()[-1])
    if name == "generate.py":
        assert "the same tokens as with DynamicCache: True" in out


def test_attention_is_measured(tmp_path: Path) -> None:
    need("torch")
    run(PYTHON / "benches" / "attention_errors.py", tmp_path, "--batches", 1, "--longest", 60)
    errors = json.loads((tmp_path / "attention_errors.json").read_text())["errors"]
    assert {error["layout"] for error in errors} >= {"sliced, apart", "4 layers a tensor, interleaved"}
    assert all(error["relative"] < 0.01 for error in errors)


def test_caches_are_measured(tmp_path: Path) -> None:
    need("torch", "transformers")
    run(
        PYTHON / "benches" / "hf_caches.py",
        *(tmp_path, "--tiny", "--device", "cpu", "--rounds", 1, "--steps", 6, "--shape", "2,40,16"),
    )
    (shape,) = json.loads((tmp_path / "hf_caches.json").read_text())["shapes"]
    tokens = shape["answers"]["tokens"]
    assert (tokens["positions"], tokens["differ_where_clear"]) == (32, 0)
    assert (tmp_path / "hf_caches.md").read_text().count("2 x (40 + 16)") == 3


@pytest.mark.parametrize("module", ["vattn.torch", "vattn.transformers"])
def test_without_pytorch_it_is_said_what_to_install(module: str) -> None:
    program = f"""
import sys
sys.modules["torch"] = None
try:
    import {module}
except ImportError as error:
    print(error)
"""
    assert re.search(r"needs (transformers 5 and )?PyTorch: pip install .*torch", run("-c", program))


def test_an_old_transformers_is_told_so() -> None:
    need("torch", "transformers")
    program = """
import transformers
transformers.__version__ = "4.57.1"
try:
    import vattn.transformers
except ImportError as error:
    print(error)
"""
    assert "needs transformers 5" in run("-c", program) and "this is transformers 4.57.1" in run(
        "-c", program
    )

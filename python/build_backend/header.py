"""Builds the wheel: gives maturin the C header as cffi reads it, and leaves the rest to maturin.

cffi knows no preprocessor, so what `include/vattn.h` has for one is resolved here, as a C compiler of C17
would. Every declaration is the header's own: no prototype is written a second time.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import maturin

ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = {
    "#ifdef __cplusplus": False,
    "#ifndef __cplusplus": True,
    "#ifndef VATTN_H": True,
    "#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L": False,
    "#if __STDC_VERSION__ >= 202311L": False,
}
LIMITS = {"UINT64_MAX": 2**64 - 1, "UINT32_MAX": 2**32 - 1}


def declarations(header: str) -> str:
    """What cffi is to be told of a header: comments, conditions and function bodies resolved."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    lines: list[str] = []
    kept: list[bool] = []
    for line in header.splitlines():
        line = re.sub(r"//.*", "", line).strip()
        if line.startswith("#if"):
            kept.append(CONDITIONS[line])
        elif line == "#else":
            kept[-1] = not kept[-1]
        elif line == "#endif":
            kept.pop()
        elif not all(kept) or not line or line.startswith("#include"):
            continue
        elif define := re.fullmatch(r"#define (\w+) (\S+)", line):
            name, value = define.groups()
            lines.append(f"#define {name} {LIMITS.get(value, value)}")
        elif not line.startswith("#define"):
            lines.append(line)
    return re.sub(r"static inline [^{]*\{.*?\n\}\n", "", "\n".join(lines) + "\n", flags=re.DOTALL)


def _write() -> None:
    """Puts them where maturin looks for a header before it would make one."""
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1", "--manifest-path", ROOT / "Cargo.toml"],
        check=True,
        stdout=subprocess.PIPE,
    )
    target = Path(json.loads(metadata.stdout)["target_directory"])
    target.mkdir(parents=True, exist_ok=True)
    text = declarations((ROOT / "include" / "vattn.h").read_text(encoding="utf-8"))
    (target / "header.h").write_text(text, encoding="utf-8")


def build_wheel(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    _write()
    return str(maturin.build_wheel(directory, settings, metadata))


def build_editable(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    _write()
    return str(maturin.build_editable(directory, settings, metadata))


def build_sdist(directory: str, settings: Any = None) -> str:
    raise RuntimeError(
        "there is no source distribution of vattn yet; install from a clone: pip install ./python"
    )


get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable

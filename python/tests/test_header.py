"""Is all of the C header in the package, and under the same names?"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from world import ROOT

import vattn
from vattn import _call, cache, errors, geometry, stats
from vattn._native import ffi

LEFT_OUT = {"vattn_dlpack_destroy": "capsules end through vattn_dlpack_capsule_destroy"}
PACKAGE = Path(vattn.__file__).parent


def used() -> str:
    return "\n".join(path.read_text() for path in PACKAGE.glob("*.py"))


def unused(symbols: list[str], text: str) -> list[str]:
    names = set(re.findall(r"\bvattn_\w+", text))
    return [symbol for symbol in symbols if symbol not in names]


def test_every_function_of_the_header_is_called() -> None:
    symbols = (ROOT / "include" / "vattn.symbols").read_text().split()
    assert len(symbols) > 70
    assert unused(symbols, used()) == sorted(LEFT_OUT)


def test_a_function_that_is_not_called_is_seen() -> None:
    assert unused(["vattn_a", "vattn_ab"], "lib.vattn_ab(x)") == ["vattn_a"]


@pytest.mark.parametrize(
    ("struct", "kind"),
    [
        ("vattn_bytes", stats.Bytes),
        ("vattn_stats", stats.Stats),
        ("vattn_call_stats", stats.CallStats),
        ("vattn_live", stats.Live),
        ("vattn_layout", stats.Layout),
        ("vattn_tensor", stats.Tensor),
        ("vattn_cuda_device", stats.CudaDevice),
        ("vattn_buffer_info", stats.BufferInfo),
        ("vattn_layers", geometry.Layers),
        ("vattn_slot", vattn.Slot),
    ],
)
def test_a_dataclass_has_the_fields_of_its_struct(struct: str, kind: type) -> None:
    fields = [name for name, _ in ffi.typeof(struct).fields if name not in ("struct_size", "reserved")]
    assert [field.name for field in dataclasses.fields(kind)] == fields


def test_every_option_of_the_config_can_be_given() -> None:
    fields = {name for name, _ in ffi.typeof("vattn_config").fields}
    derived = {"struct_size", "reserved", "layers_per_tensor", "extents", "extents_count"}
    assert fields - derived == set(cache.Options.__annotations__)


def test_every_status_has_an_exception() -> None:
    assert set(errors.CLASSES) == set(errors.STATUSES.values()) - {0}
    assert all(getattr(vattn, kind.__name__) is kind for kind in errors.CLASSES.values())


def test_every_type_of_element_has_a_name() -> None:
    numbers = set(_call.names("vattn_dtype", "VATTN_DTYPE_").values()) - {0}
    assert numbers == set(geometry.DTYPES.values()) == set(geometry.ELEMENT_BYTES)
    assert set(geometry.TYPESTRS) == set(geometry.DTYPES)


def test_what_is_public_is_listed_and_documented() -> None:
    for name in vattn.__all__:
        value = getattr(vattn, name)
        assert not callable(value) or value.__doc__, name
    assert vattn.__all__ == sorted(vattn.__all__)

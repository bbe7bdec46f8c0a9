"""What the tests are made of: a small model of float32, the host driver with small granules, a cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from world import DIM, HEADS, LAYERS

import vattn


@pytest.fixture
def model() -> vattn.Geometry:
    return vattn.Geometry([vattn.Layers(LAYERS, kv_heads=HEADS, key_dim=DIM, value_dim=DIM)], dtype="float32")


@pytest.fixture
def driver() -> vattn.HostDriver:
    return vattn.HostDriver("256MiB", granule="64KiB")


@pytest.fixture
def cache(model: vattn.Geometry, driver: vattn.HostDriver) -> Iterator[vattn.KvCache]:
    with vattn.KvCache(model, driver, budget="16MiB", max_slots=8, max_tokens=4096) as cache:
        yield cache

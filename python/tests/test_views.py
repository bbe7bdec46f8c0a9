"""Views: what they show, where they go, and what stays while they live."""

from __future__ import annotations

import gc
import pickle
import sys

import numpy as np
import pytest
from world import DIM, HEADS

import vattn


def filled(cache: vattn.KvCache, length: int, value: float) -> vattn.Slot:
    slot = cache.acquire(length)
    cache.step({slot: length})
    cache.view(slot, 0).numpy()[:] = value
    return slot


def test_all_views_are_of_the_same_memory(cache: vattn.KvCache) -> None:
    filled(cache, 1, 0)
    slot, layout = filled(cache, 100, 0), cache.layout
    keys = cache.view(slot, 1, "key").numpy()
    keys[:] = np.arange(keys.size).reshape(keys.shape)
    raw, pages, rows = (view(1).numpy() for view in (cache.raw, cache.pages, cache.rows))
    assert raw.shape == (8, layout.stride_tokens, HEADS, DIM)
    assert pages.shape[1] == layout.page_tokens and rows.shape[0] == 1
    assert (raw[slot.index, :100] == keys).all()
    first = slot.index * layout.pages_per_slot
    assert (pages[first : first + 7].reshape(-1, HEADS, DIM)[:100] == keys).all()
    assert (rows[0, slot.index * layout.stride_tokens :][:100] == keys).all()
    assert cache.raw(1).data_ptr == cache.pages(1).data_ptr == cache.rows(1).data_ptr
    assert cache.view(slot, 1).data_ptr == cache.raw(1).data_ptr + 4 * slot.index * cache.raw(1).strides[0]


def test_a_view_covers_what_is_backed(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    assert cache.view(slot, 0).shape == (0, HEADS, DIM) and cache.view(slot, 0).numpy().size == 0
    cache.step({slot: 50})
    view = cache.view(slot, 0)
    cache.step({slot: 60})
    assert view.shape[0] == 50 and cache.view(slot, 0).shape[0] == 60
    assert cache.view(slot, 0, tokens=20).shape[0] == 20
    with pytest.raises(ValueError, match="tokens is 61, and 60 of the slot are backed"):
        cache.view(slot, 0, tokens=61)
    with pytest.raises(AttributeError, match="does not change"):
        view.shape = (10**9, HEADS, DIM)
    for layer, part in ((3, "key"), (2**32, "key"), (-1, "key"), (0, "query"), (0, 1)):
        with pytest.raises((ValueError, TypeError)):
            cache.view(slot, layer, part)
    cache.retire(slot, vattn.IDLE)
    with pytest.raises(vattn.StaleSlot):
        cache.view(slot, 0)


def test_a_view_is_of_a_slot(cache: vattn.KvCache) -> None:
    for wrong in (None, 0, "slot"):
        with pytest.raises(TypeError, match="is no slot; give what KvCache.acquire returned"):
            cache.view(wrong, 0)  # type: ignore[arg-type]
    assert cache.stats().pins == 0


@pytest.mark.filterwarnings("ignore:a vattn.KvCache was closed while:ResourceWarning")
@pytest.mark.parametrize("form", ["array", "memoryview", "dlpack", "dlpack of a view that went"])
def test_what_was_made_from_a_view_outlives_slot_cache_and_driver(form: str, model: vattn.Geometry) -> None:
    inner = vattn.HostDriver("64MiB", granule="64KiB")
    driver = vattn.CheckedDriver(inner)
    cache = vattn.KvCache(model, driver, budget="16MiB", max_slots=2, max_tokens=4096)
    slot = filled(cache, 500, 7)
    view = cache.view(slot, 0)
    if form == "array":
        made = view.numpy()
    elif form == "memoryview":
        made = memoryview(view.numpy())
    else:
        made = np.from_dlpack(view)
    if form != "array":
        del view
    cache.retire(slot, vattn.IDLE)
    cache.trim(0, vattn.IDLE)
    cache.flush()
    assert (np.asarray(made) == 7).all()
    cache.close()
    assert (np.asarray(made) == 7).all() and made.shape == (500, HEADS, DIM)
    assert driver.live().mappings > 0
    view = None
    del made
    gc.collect()
    assert driver.live() == vattn.Live(0, 0, 0, 0)


def test_closing_under_views_says_how_many_there_are(model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    cache = vattn.KvCache(model, driver, budget="4MiB")
    views = [cache.raw(0), cache.raw(1), np.from_dlpack(cache.view(filled(cache, 10, 1), 0))]
    with pytest.warns(ResourceWarning, match="closed while 3 views and tensors of it live.* bytes"):
        cache.close()
    assert views[0].data_ptr and cache.closed


def test_a_view_is_pinned_once_however_many_arrays_there_are(cache: vattn.KvCache) -> None:
    slot = filled(cache, 10, 1)
    view = cache.view(slot, 0)
    arrays = [view.numpy()[k:] for k in range(5)]
    assert cache.stats().pins == 1 and cache.bytes().pinned > 0
    del view
    assert cache.stats().pins == 1
    arrays.clear()
    assert cache.stats().pins == 0 and cache.bytes().pinned == 0


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3), (7, 0)])
def test_a_capsule_that_nobody_takes_gives_its_pin_up(
    version: tuple[int, int] | None, cache: vattn.KvCache
) -> None:
    view = cache.view(filled(cache, 10, 1), 0)
    capsule = view.__dlpack__(max_version=version)
    assert ("dltensor_versioned" in repr(capsule)) == (version is not None and version[0] >= 1)
    assert cache.stats().pins == 2
    del capsule
    assert cache.stats().pins == 1


def test_a_consumer_that_fails_leaves_nothing_behind(driver: vattn.HostDriver) -> None:
    model = vattn.Geometry([vattn.Layers(1, 1, 32, 32)], dtype="bfloat16")
    with vattn.KvCache(model, driver, budget="4MiB") as cache:
        view = cache.view(filled(cache, 10, 1), 0)
        with pytest.raises((BufferError, RuntimeError)):
            np.from_dlpack(view)  # NumPy has no bfloat16
        assert cache.stats().pins == 1
        del view


def test_dlpack_refuses_what_it_can_not_give(cache: vattn.KvCache) -> None:
    view = cache.view(filled(cache, 10, 1), 0)
    assert view.__dlpack_device__() == (1, 0)
    assert view.__dlpack__(dl_device=(1, 0), copy=False) is not None
    for options in ({"copy": True}, {"dl_device": (2, 0)}, {"stream": 1}):
        with pytest.raises(BufferError):
            view.__dlpack__(**options)
    assert cache.stats().pins == 1
    with pytest.raises(TypeError):
        pickle.dumps(view)
    with pytest.raises(TypeError):
        vattn.View(None, data_ptr=0, shape=(1,), strides=(1,), dtype="int8", element_bytes=1, device=(1, 0),
                   touchable=True)  # fmt: skip


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
)
def test_every_type_has_one_of_numpy(dtype: str, driver: vattn.HostDriver) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = vattn.Geometry([vattn.Layers(1, 2, 32, 16)], dtype=dtype)
    with vattn.KvCache(model, driver, budget="4MiB") as cache:
        slot = cache.acquire()
        cache.step({slot: 9})
        keys, values = cache.view(slot, 0).numpy(), cache.view(slot, 0, "value").numpy()
        assert keys.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)) and values.shape == (9, 2, 16)
        keys[:], values[:] = 1, 2
        assert (keys.astype(np.float32) == 1).all() and (values.astype(np.float32) == 2).all()
        del keys, values


def test_without_ml_dtypes_bfloat16_is_its_bits(
    driver: vattn.HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    model = vattn.Geometry([vattn.Layers(1, 1, 32, 32)])
    with vattn.KvCache(model, driver, budget="4MiB") as cache:
        slot = cache.acquire()
        cache.step({slot: 3})
        keys = cache.view(slot, 0).numpy()
        assert keys.dtype == np.uint16
        del keys


def test_without_numpy_it_says_what_to_install(cache: vattn.KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    view = cache.raw(0)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match="pip install numpy"):
        view.numpy()
    del view


def test_the_addresses_of_a_ledger_can_not_be_touched(model: vattn.Geometry) -> None:
    for driver in (vattn.LedgerDriver("1TiB"), vattn.CheckedDriver(vattn.LedgerDriver("1TiB"))):
        with vattn.KvCache(model, driver, budget="1GiB") as cache:
            slot = cache.acquire()
            cache.step({slot: 1000})
            view = cache.view(slot, 0)
            with pytest.raises(BufferError, match="ledger"):
                view.__dlpack__()
            with pytest.raises(TypeError, match="ledger"):
                view.numpy()
            assert not hasattr(view, "__array_interface__")
            del view


def test_a_latent_has_keys_alone(driver: vattn.HostDriver) -> None:
    model = vattn.Geometry([vattn.Layers(2, 0, 576, 0)])
    with vattn.KvCache(model, driver, budget="8MiB") as cache:
        slot = cache.acquire()
        cache.step({slot: 3})
        assert cache.view(slot, 1).shape == (3, 1, 576)
        with pytest.raises(vattn.InvalidArgument):
            cache.view(slot, 1, "value")

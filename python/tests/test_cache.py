"""A cache from a request's beginning to its end."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from world import DIM, HEADS, LAYERS

import vattn


def test_tokens_are_backed_and_kept_while_a_slot_grows(cache: vattn.KvCache) -> None:
    slot = cache.acquire(10)
    other = cache.acquire()
    for length in range(1, 300, 7):
        cache.step([(slot, length), (other, 2 * length)])
        for layer in range(LAYERS):
            cache.view(slot, layer, "key").numpy()[length - 1] = length
            cache.view(slot, layer, "value").numpy()[length - 1] = -length
    for layer in range(LAYERS):
        keys, values = cache.view(slot, layer).numpy(), cache.view(slot, layer, "value").numpy()
        assert keys.shape == (295, HEADS, DIM)
        assert all((keys[length - 1] == length).all() for length in range(1, 296, 7))
        assert all((values[length - 1] == -length).all() for length in range(1, 296, 7))


def test_a_retired_slot_is_refused_and_its_memory_adopted(cache: vattn.KvCache) -> None:
    slot = cache.acquire(100)
    cache.step({slot: 100})
    cache.retire(slot, vattn.IDLE)
    with pytest.raises(vattn.StaleSlot):
        cache.step({slot: 101})
    again = cache.acquire(100)
    assert again.index == slot.index and again.generation > slot.generation and again != slot
    assert cache.stats().adopted == 1


def test_truncate_takes_tokens_away(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    cache.step({slot: 100})
    cache.truncate(slot, 10, vattn.IDLE)
    assert cache.view(slot, 0).shape == (10, HEADS, DIM)
    cache.step({slot: 11})
    with pytest.raises(vattn.FewerTokens) as caught:
        cache.step({slot: 10})
    assert "11" in str(caught.value) and isinstance(caught.value, ValueError)


def test_fits_and_admits_say_what_a_step_then_does(cache: vattn.KvCache) -> None:
    slots = [cache.acquire() for _ in range(8)]
    wanted = [(slot, 4096) for slot in slots]
    fits = cache.fits(wanted)
    assert True in fits and False in fits
    cache.step([entry for entry, fit in zip(wanted, fits, strict=True) if fit])
    with pytest.raises(vattn.OutOfBudget) as caught:
        cache.step([wanted[fits.index(False)]])
    assert caught.value.name == "out_of_budget" and caught.value.driver is None
    cache.retire(slots[0], vattn.IDLE)
    assert cache.admits([100, 10_000_000]) == 1
    assert cache.admits(np.array([100, 100], dtype=np.int32)) == 1


def test_the_books_agree_with_themselves(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    cache.step({slot: 1000})
    held = cache.bytes()
    assert held.held == held.mapped + held.parked + held.free_bytes + held.quarantined
    assert held.needed == 1000 * cache.layout.bytes_per_token
    assert cache.bytes_for(1000) <= held.mapped
    assert cache.stats().steps == 1 and cache.stats().health == cache.health() == "healthy"
    assert cache.stats_json()["slots"]["active"] == 1
    assert [slot["tokens"] for slot in cache.report()["slots"]] == [1000]
    assert cache.calls("map").calls > 0 and cache.calls().calls > cache.calls("map").calls


def test_memory_is_given_back(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    cache.step({slot: 4000})
    cache.retire(slot, vattn.IDLE)
    assert cache.reclaim("1MiB", vattn.IDLE) >= 0
    cache.trim(0, vattn.IDLE)
    cache.flush()
    assert cache.bytes().held == 0
    cache.set_budget("1MiB")
    assert cache.bytes().budget == 2**20


def test_the_layout_is_planned_as_it_then_is(model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    options = {"max_slots": 4, "max_tokens": 1000, "layout": 2, "kv_order": "interleaved", "spare_slot": True}
    plan = vattn.plan(model, granule="64KiB", **options)
    with vattn.KvCache(model, driver, **options) as cache:
        assert cache.layout == plan
        assert plan.slots == 5 and plan.spare_slot == 4 and plan.tensors == 2
        tensor = cache.tensor(1)
        assert (tensor.first_layer, tensor.layers, tensor.has_keys, tensor.has_values) == (2, 1, True, True)
        cache.raw(2, "value").numpy()[plan.spare_slot, 0] = 1


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "per_layer", "commit": "whole"},
        {"commit": [(1, 8), (4, 2)], "reclaim": "eager", "background": "off"},
        {"look_ahead": 0, "look_ahead_budget": "1MiB", "at_hand": 0, "slack_divisor": 8},
        {"tile_tokens": 64, "page_tokens": 32, "max_tokens": None},
    ],
)
def test_options_reach_the_cache(
    model: vattn.Geometry, driver: vattn.HostDriver, options: dict[str, object]
) -> None:
    with vattn.KvCache(model, driver, **({"budget": "4MiB", "max_slots": 2} | options)) as cache:
        slot = cache.acquire()
        cache.prefetch([slot], [50])
        cache.step([slot], [50])
        assert cache.layout.tile_tokens == options.get("tile_tokens", 1)
        if "commit" in options:
            assert cache.bytes().held >= 2**20
        assert cache.view(slot, 0).shape[0] == (64 if "tile_tokens" in options else 50)


def test_the_caller_can_do_the_background_work(model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    with vattn.KvCache(model, driver, budget="4MiB", background="caller") as cache:
        slot = cache.acquire()
        cache.prefetch({slot: 100})
        while cache.tend():
            pass
        assert cache.bytes().ahead > 0
    with vattn.KvCache(model, driver, budget="4MiB") as cache, pytest.raises(vattn.InvalidArgument):
        cache.tend()


def test_geometries_come_by_name_from_a_config_and_in_numbers(tmp_path: Path) -> None:
    llama = vattn.Geometry.preset("llama-3-8b", tensor_parallel=2)
    assert (llama.layers, llama.dtype, llama.bytes_per_token) == (32, "bfloat16", 65536)
    assert llama.layer(31) == vattn.Layers(1, 4, 128, 128)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 256,
        "torch_dtype": "float16",
    }
    made = vattn.Geometry.from_hf_config(config)
    assert (made.layers, made.dtype, made.layer(0)) == (2, "float16", vattn.Layers(1, 2, 32, 32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, str(tmp_path / "config.json")):
        assert vattn.Geometry.from_hf_config(path, dtype=np.float32).bytes_per_token == 2 * 2 * 64 * 4

    class Config:
        def to_json_string(self, use_diff: bool) -> str:
            return json.dumps(config)

    assert vattn.Geometry.from_hf_config(Config()).layers == 2
    mixed = vattn.Geometry([vattn.Layers(2, 8, 64, 64), vattn.Layers(3, 0, 576, 0)], dtype="float8_e4m3fn")
    assert mixed.layers == 5 and mixed.layer(4) == vattn.Layers(1, 0, 576, 0)
    assert vattn.Geometry.preset("llama-3-8b").tile_tokens("fa3-decode") > 1


def test_objects_can_go_in_any_order(model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    cache = vattn.KvCache(model, driver, budget="4MiB")
    driver.close()
    model.close()
    with cache:
        slot = cache.acquire()
        cache.step({slot: 10})
        cache.view(slot, 0).numpy()[:] = 1
    assert cache.closed and "closed" in repr(cache)
    with pytest.raises(vattn.InvalidHandle, match="KvCache was closed"):
        cache.acquire()
    cache.close()
    with pytest.raises(vattn.InvalidHandle):
        driver.memory()
    with pytest.raises(vattn.InvalidHandle):
        model.layer(0)


def test_nothing_is_copied_by_accident(
    cache: vattn.KvCache, driver: vattn.HostDriver, model: vattn.Geometry
) -> None:
    for owned in (cache, driver, model, cache.raw(0)):
        for refused in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="belongs to its process"):
                refused(owned)


def test_a_cache_that_nobody_closed_is_closed_and_told_of(model: vattn.Geometry) -> None:
    driver = vattn.CheckedDriver(vattn.HostDriver("64MiB", granule="64KiB"))
    cache = vattn.KvCache(model, driver, budget="4MiB", commit="whole")
    assert driver.live().handles > 0
    with pytest.warns(ResourceWarning, match="KvCache was not closed"):
        del cache
    assert driver.live() == vattn.Live(0, 0, 0, 0)

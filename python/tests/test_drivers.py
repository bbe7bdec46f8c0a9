"""Drivers, fences and streams; failures that are made, and what an exception tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest

import vattn


@dataclass
class TorchStream:
    cuda_stream: int


@dataclass
class TorchEvent:
    cuda_event: Any


@dataclass
class Stream:
    """As CuPy has it; its Event is told apart by its name."""

    ptr: int


@dataclass
class Event:
    ptr: int


class CoreStream:
    """As cuda.core has it."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 7)


def test_streams_and_events_are_known_by_their_attributes(cache: vattn.KvCache) -> None:
    assert (
        vattn.Stream(TorchStream(7))
        == vattn.Stream(Stream(7))
        == vattn.Stream(CoreStream())
        == vattn.Stream(7)
    )
    assert vattn.Event(TorchEvent(7)) == vattn.Event(Event(7)) == vattn.Event(7)
    for fence in (vattn.IDLE, vattn.Stream(0), TorchStream(7), Stream(7), CoreStream()):
        cache.retire(cache.acquire(5), fence)
    slot = cache.acquire(stream=TorchStream(7))
    cache.truncate(slot, 0, vattn.IDLE, vattn.Stream(1))
    cache.retire(cache.acquire(stream=3), vattn.IDLE)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: vattn.Stream(-1), ValueError, "stream is -1"),
        (lambda: vattn.Stream(2**64), ValueError, "stream is 18446744073709551616"),
        (lambda: vattn.Stream("x"), TypeError, "stream is 'x'"),
        (lambda: vattn.Stream(None), TypeError, "stream is None"),
        (lambda: vattn.Event(0), ValueError, "never recorded"),
        (lambda: vattn.Event(TorchEvent(0)), ValueError, "never recorded"),
        (lambda: vattn.HostDriver("x"), ValueError, "write '2GiB'"),
        (lambda: vattn.HostDriver("2 GB"), ValueError, "write '2GiB'"),
        (lambda: vattn.HostDriver("2.5GiB"), ValueError, "write '2GiB'"),
        (lambda: vattn.HostDriver(-1), ValueError, "capacity is -1"),
        (lambda: vattn.HostDriver(2**64), ValueError, "can be from 0"),
        (lambda: vattn.HostDriver("99999999999TiB"), ValueError, "can be from 0"),
        (lambda: vattn.HostDriver(1.0), TypeError, "such as '2GiB'"),
        (lambda: vattn.HostDriver(None), TypeError, "such as '2GiB'"),
        (lambda: vattn.HostDriver("1GiB", granule=3), vattn.InvalidConfig, "power of two"),
        (
            lambda: vattn.LedgerDriver("1GiB", granule=1000),
            vattn.InvalidConfig,
            "HostDriver|LedgerDriver|granule",
        ),
        (lambda: vattn.CudaDriver(-2), ValueError, "ordinal is -2"),
        (lambda: vattn.CudaDriver(0, exportable=2), TypeError, "True or False"),
        (lambda: vattn.CheckedDriver("host"), TypeError, "has to be a driver"),
        (lambda: vattn.Driver(), TypeError, "make a HostDriver"),
        (lambda: vattn.Geometry([]), vattn.InvalidGeometry, "Geometry"),
        (lambda: vattn.Geometry([1]), TypeError, "list of vattn.Layers"),
        (lambda: vattn.Geometry([vattn.Layers(-1, 1, 1, 1)]), ValueError, "layers is -1"),
        (
            lambda: vattn.Geometry([vattn.Layers(1, 1, 1, 1)], dtype="float64"),
            ValueError,
            "dtype is 'float64'",
        ),
        (lambda: vattn.Geometry([vattn.Layers(1, 1, 1, 1)], tensor_parallel=0), vattn.InvalidGeometry, "0"),
        (lambda: vattn.Geometry.preset("nobody"), vattn.InvalidGeometry, "llama-3-8b"),
        (lambda: vattn.Geometry.preset("a\0b"), ValueError, "NUL"),
        (lambda: vattn.Geometry.preset(5), TypeError, "a string"),
        (lambda: vattn.Geometry.from_hf_config(5), TypeError, "config.json"),
        (lambda: vattn.Geometry.from_hf_config({}), vattn.InvalidGeometry, "from_hf_config"),
        (lambda: vattn.plan(5), TypeError, "Geometry.preset"),
    ],
)
def test_what_can_not_be_is_refused(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"budget": "2 GB"}, ValueError, "budget is '2 GB'"),
        ({"budget": 0}, vattn.InvalidConfig, "budget"),
        ({"max_slots": 2**32}, ValueError, "max_slots is 4294967296; it can be from 0 to 4294967295"),
        ({"max_slots": 2**31}, vattn.InvalidConfig, "max_slots"),
        ({"max_tokens": "many"}, TypeError, "max_tokens is 'many'"),
        ({"max_tokens": 0}, vattn.InvalidConfig, "max_tokens"),
        ({"layout": "flat"}, ValueError, "'sliced', 'per_layer'"),
        ({"layout": "grouped"}, ValueError, "'sliced', 'per_layer'"),
        ({"layout": None, "kv_order": 1}, TypeError, "'apart', 'interleaved'"),
        ({"commit": 5}, TypeError, "pairs of granules"),
        ({"commit": "extents"}, ValueError, "'on_demand', 'whole'"),
        ({"commit": [(3, 1)]}, vattn.InvalidArgument, "an extent of commit has 3 granules; use 1, 2"),
        ({"spare_slot": "yes"}, TypeError, "True or False"),
        ({"spare_slot": numpy.array([1, 0])}, TypeError, "True or False"),
        ({"slots": 5}, TypeError, "slots is no option of a cache; there are budget, max_tokens"),
    ],
)
def test_options_that_can_not_be_are_refused(
    options: Any, kind: type[Exception], text: str, model: vattn.Geometry, driver: vattn.HostDriver
) -> None:
    with pytest.raises(kind, match=text):
        vattn.KvCache(model, driver, **options)


def test_a_fence_is_asked_for_and_no_number_is_one(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    with pytest.raises(vattn.InvalidArgument, match="no fence"):
        cache.retire(slot)
    for garbage in (7, None, "idle", object()):
        with pytest.raises(TypeError, match="is no fence"):
            cache.retire(slot, garbage)
    for garbage in (0, None, (0, 0, 1)):
        with pytest.raises(TypeError, match="is no slot"):
            cache.retire(garbage, vattn.IDLE)


def test_a_stream_under_capture_is_refused(driver: vattn.HostDriver, cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    driver.set_capturing(5, True)
    with pytest.raises(vattn.CapturingStream):
        cache.retire(slot, vattn.Stream(5))
    driver.set_capturing(5, False)
    cache.retire(slot, vattn.Stream(5))


def test_an_exception_tells_what_the_driver_said(model: vattn.Geometry) -> None:
    driver = vattn.CheckedDriver(vattn.HostDriver("64MiB", granule="64KiB"))
    with vattn.KvCache(model, driver, budget="16MiB") as cache:
        slot = cache.acquire()
        driver.fail(1, vattn.OutOfDeviceMemory, verb="create", onward=True)
        with pytest.raises(MemoryError) as caught:
            cache.step({slot: 1000})
        error = caught.value
        assert (
            isinstance(error, vattn.OutOfDeviceMemory) and error.number == vattn.OutOfDeviceMemory.status == 5
        )
        assert error.name == "out_of_device_memory" and error.verb == "create" and error.driver_bytes >= 65536
        assert error.driver == (error.verb, error.driver_code, error.driver_name, error.driver_bytes)
        assert error.message == str(error) and error.message.startswith("KvCache.step")
        assert driver.calls("create")[1] >= 1 and driver.calls()[0] > 0
        driver.clear_failures()
        driver.fail(1, "driver", verb="map")
        with pytest.raises(vattn.DriverError):
            cache.step({slot: 1000})
        cache.step({slot: 1000})
    with pytest.raises(ValueError, match="verb is 'fly'; it can be 'reserve'"):
        driver.fail(1, "driver", verb="fly")
    assert driver.live() == vattn.Live(0, 0, 0, 0)


def test_a_lost_device_fails_the_cache_and_leaves_its_statistics(model: vattn.Geometry) -> None:
    driver = vattn.CheckedDriver(vattn.HostDriver("64MiB", granule="64KiB"))
    with vattn.KvCache(model, driver, budget="16MiB", background="off") as cache:
        slot = cache.acquire()
        driver.fail(1, vattn.DeviceLost, verb="map")
        with pytest.raises(vattn.DeviceLost):
            cache.step({slot: 1000})
        assert cache.health() == "failed" and cache.stats().health == "failed"
        with pytest.raises(vattn.Unhealthy):
            cache.step({slot: 1000})
        assert cache.raw(0).shape[0] == 1024


def test_without_a_gpu_it_says_what_to_install() -> None:
    found = vattn.probe()
    assert found["version"] == vattn.__version__
    if "error" not in found["cuda"]:
        pytest.skip("there is a GPU")
    with pytest.raises(vattn.Unsupported, match=r"install NVIDIA's driver, or use the host driver"):
        vattn.CudaDriver()
    for ask in (vattn.cuda_devices, lambda: vattn.cuda_device(0)):
        with pytest.raises(vattn.Unsupported):
            ask()

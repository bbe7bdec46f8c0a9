"""Buffers, and what is known by name."""

from __future__ import annotations

import numpy as np
import pytest

import vattn

KIB = 1024


@pytest.fixture
def checked() -> vattn.CheckedDriver:
    return vattn.CheckedDriver(vattn.HostDriver("64MiB", granule="64KiB"))


def test_a_range_is_backed_when_it_is_committed(checked: vattn.CheckedDriver) -> None:
    with vattn.Buffer("1GiB", checked) as buffer:
        assert buffer.info().committed == buffer.info().held == 0 and buffer.size == 2**30
        buffer.commit("1MiB", 100 * KIB)
        rows = buffer.array("float32", (25, 1024), "1MiB").numpy()
        rows[:] = 5
        assert buffer.info().committed == 100 * KIB and buffer.info().held >= 100 * KIB
        buffer.commit("1MiB", 200 * KIB)
        assert (rows == 5).all() and rows.ctypes.data == buffer.data_ptr + 2**20
        del rows
        buffer.decommit("1MiB", "200KiB", vattn.IDLE)
        assert buffer.info().committed == buffer.info().held == 0
    assert buffer.closed and checked.live() == vattn.Live(0, 0, 0, 0)
    with pytest.raises(vattn.InvalidHandle, match="Buffer was closed"):
        buffer.commit(0, 1)


def test_a_commit_that_fails_commits_nothing(checked: vattn.CheckedDriver) -> None:
    with vattn.Buffer("16MiB", checked, largest_extent="64KiB") as buffer:
        checked.fail(5, vattn.OutOfDeviceMemory, verb="create")
        with pytest.raises(vattn.OutOfDeviceMemory):
            buffer.commit(0, "1MiB")
        assert buffer.info().committed == buffer.info().held == 0
        buffer.commit(0, "1MiB")


def test_an_array_outlives_the_buffer(checked: vattn.CheckedDriver) -> None:
    buffer = vattn.Buffer("16MiB", checked)
    buffer.commit(0, "64KiB")
    array = np.from_dlpack(buffer.array("int8", 64 * KIB))
    array[:] = 3
    buffer.close()
    assert (array == 3).all() and checked.live().mappings > 0
    del array
    assert checked.live() == vattn.Live(0, 0, 0, 0)


def test_shapes_and_ranges_that_can_not_be_are_refused(checked: vattn.CheckedDriver) -> None:
    with vattn.Buffer("1MiB", checked) as buffer:
        assert buffer.array("uint8", ()).shape == () and buffer.array(np.float32, (0, 5)).strides == (5, 1)
        for arguments, kind, text in (
            (("float32", 2**18 + 1), ValueError, "takes 1048580 bytes, and the buffer has 1048576"),
            (("float32", 1, 2), ValueError, "multiple of 4"),
            (("float32", 2**62), ValueError, "takes"),
            (("float32", -1), ValueError, "shape is -1"),
            (("float32", "ab"), TypeError, "shape is 'ab'"),
            (("float32", 1.5), TypeError, "shape is 1.5"),
            (("complex64", 1), ValueError, "dtype is 'complex64'"),
            ((None, 1), TypeError, "dtype is None"),
        ):
            with pytest.raises(kind, match=text):
                buffer.array(*arguments)
        for offset, size in ((0, 0), (0, 2**20 + 1), (2**20, 1), (2**63, 2**63)):
            with pytest.raises(vattn.InvalidArgument, match=r"Buffer\.commit"):
                buffer.commit(offset, size)
        with pytest.raises(ValueError, match="offset is -1"):
            buffer.commit(-1, 1)
        with pytest.raises(vattn.InvalidArgument, match="no fence"):
            buffer.decommit(0, 1)
    for size, kind in ((0, vattn.InvalidArgument), ("x", ValueError), (None, TypeError)):
        with pytest.raises(kind):
            vattn.Buffer(size, checked)
    with pytest.raises(TypeError, match="give a vattn driver"):
        vattn.Buffer("1MiB", "host")


def test_the_catalog_names_what_geometries_know() -> None:
    for preset in vattn.presets():
        model = vattn.Geometry.preset(preset.name)
        assert (model.layers, model.dtype) == (preset.layers, preset.dtype)
        assert model.bytes_per_token == preset.bytes_per_token
        assert model.layer(0) == vattn.Layers(1, preset.kv_heads, preset.key_dim, preset.value_dim)
    llama = vattn.Geometry.preset("llama-3-8b")
    kernels = {kernel.name: kernel for kernel in vattn.kernels()}
    assert kernels["flashinfer"].exact and llama.tile_tokens("flashinfer") == 1
    tiles = [
        tile
        for tile in kernels["fa3-decode"].tiles
        if llama.dtype in tile.dtypes and tile.key_dim >= 128 and tile.value_dim >= 128
    ]
    assert llama.tile_tokens("fa3-decode") == tiles[0].tokens

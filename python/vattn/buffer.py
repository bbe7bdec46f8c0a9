"""Buffers: addresses that never move, of which any part can be backed. For tensors that grow in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from vattn._call import Owned, check, keep, number, size, sized
from vattn._native import ffi, lib
from vattn.drivers import Driver
from vattn.fences import pack
from vattn.geometry import DTYPE_NAMES, ELEMENT_BYTES, dtype_number
from vattn.stats import BufferInfo, read
from vattn.views import View

_size = size


class Buffer(Owned):
    """A range of `size` bytes of addresses, with no memory until `commit`. Any thread may call any method.

    Ranges are any bytes: of two rows that share a granule one can go without the other. Memory is allocated
    in extents of up to `largest_extent` bytes (32 MiB) and is given back by whole extents of which no byte is
    committed.
    """

    def __init__(self, size: int | str, driver: Driver, *, largest_extent: int | str | None = None) -> None:
        if not isinstance(driver, Driver):
            raise TypeError(f"driver is {driver!r}; give a vattn driver, such as HostDriver()")
        options = sized("vattn_buffer_options")
        options.size = _size("size", size)
        if largest_extent is not None:
            options.largest_extent = _size("largest_extent", largest_extent)
        out = ffi.new("vattn_buffer **")
        check(lib.vattn_buffer_create(options, driver._handle, out))
        self._own(out[0], lib.vattn_buffer_destroy, "a vattn.Buffer")
        self._touchable = driver.name != "ledger"
        info = self.info()
        #: The address of the first byte. It never changes.
        self.data_ptr: int = info.data
        #: Bytes of addresses, in whole granules.
        self.size: int = info.size
        #: The unit of allocation in bytes.
        self.granule: int = info.granule

    def commit(self, offset: int | str, size: int | str) -> None:
        """Backs a range: afterwards every byte of it can be touched. What is committed already stays as it
        is, with what is in it; new memory holds whatever it held before. Whole, or not at all."""
        check(lib.vattn_buffer_commit(self._handle, _size("offset", offset), _size("size", size)))

    def decommit(self, offset: int | str, size: int | str, *fences: Any) -> None:
        """Says that the bytes of a range are no longer wanted, once the fences have fired, which are waited
        for. Arrays over the range have no memory there from then on, and touching it is fatal."""
        held = pack(fences)
        check(
            lib.vattn_buffer_decommit(
                self._handle, _size("offset", offset), _size("size", size), held, len(held)
            )
        )

    def info(self) -> BufferInfo:
        """The buffer in numbers."""
        struct = sized("vattn_buffer_info")
        check(lib.vattn_buffer_describe(self._handle, struct))
        return read(BufferInfo, struct)

    def array(self, dtype: Any, shape: int | Sequence[int], offset: int | str = 0) -> View:
        """An array over the buffer from byte `offset` on, the last dimension's elements side by side.

        The view, and whatever is made from it, keeps the addresses, and after `close` also what is committed
        then. **Touching what is not committed, or was decommitted, is fatal**: a segmentation fault on the
        host, an illegal access on a device.
        """
        kind = dtype_number(dtype)
        if dtype is None:
            raise TypeError(f"dtype is None; it can be {', '.join(map(repr, DTYPE_NAMES.values()))}")
        lengths = _lengths(shape)
        first, element = _size("offset", offset), ELEMENT_BYTES[kind]
        needed = math.prod(lengths) * element
        if first % element:
            raise ValueError(
                f"offset is {first}; it has to be a multiple of {element}, the bytes of an element"
            )
        if first + needed > self.size:
            raise ValueError(
                f"shape {list(lengths)} of {DTYPE_NAMES[kind]} from byte {first} on takes {needed} bytes, "
                f"and the buffer has {self.size}; use a smaller shape or a larger buffer"
            )
        info, out = self.info(), ffi.new("vattn_pin **")
        check(lib.vattn_pin_create_buffer(self._handle, out))
        return View(
            keep(out[0], lib.vattn_pin_destroy),
            data_ptr=self.data_ptr + first,
            shape=lengths,
            strides=tuple(max(1, math.prod(lengths[place + 1 :])) for place in range(len(lengths))),
            dtype=DTYPE_NAMES[kind],
            element_bytes=element,
            device=(info.device_type, info.device_id),
            touchable=self._touchable,
        )

    def __repr__(self) -> str:
        return f"<vattn.Buffer {'closed' if self.closed else f'of {self.size} bytes'}>"


def _lengths(shape: Any) -> tuple[int, ...]:
    try:
        return (number("shape", operator.index(shape), 2**63 - 1),)
    except TypeError:
        if isinstance(shape, str | bytes) or not hasattr(shape, "__iter__"):
            raise TypeError(f"shape is {shape!r}; it has to be a whole number or a list of them") from None
    return tuple(number("shape", length, 2**63 - 1) for length in shape)

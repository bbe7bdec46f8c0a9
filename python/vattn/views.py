"""Views: strided arrays over memory of the library, for NumPy, PyTorch, JAX, CuPy and kernels.

A view keeps a pin, and so does every DLPack tensor that is made from it; NumPy's arrays keep the view. Pins
are the library's own, so that whoever drops the last one needs no Python for it.
"""

from __future__ import annotations

import ctypes
from typing import Any

from vattn._call import check, names, sized
from vattn._native import ffi, lib
from vattn.geometry import DTYPES, TYPESTRS

CPU: int = names("vattn_device_type", "VATTN_DEVICE_")["cpu"]
BITS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
#: What a capsule is called by the major version of DLPack, before somebody takes it over.
CAPSULES = (b"dltensor", b"dltensor_versioned")


class View:
    """An array over memory of a cache or a buffer.

    Its addresses stay while it lives, and while anything lives that was made from it: a NumPy array, a tensor
    through DLPack (`torch.from_dlpack(view)`), a memoryview of one.
    """

    __slots__ = (
        "__weakref__",
        "_pin",
        "_touchable",
        "data_ptr",
        "device_id",
        "device_type",
        "dtype",
        "element_bytes",
        "shape",
        "strides",
    )

    _pin: Any
    _touchable: bool
    #: The address of the first element.
    data_ptr: int
    #: Elements along each dimension.
    shape: tuple[int, ...]
    #: From one element to the next along each dimension, in elements.
    strides: tuple[int, ...]
    #: The type of an element, such as `bfloat16`.
    dtype: str
    #: Bytes of an element.
    element_bytes: int
    #: DLPack's number for where the memory is: 1 the processor's, 2 a CUDA device's.
    device_type: int
    #: The device's number; 0 for the processor.
    device_id: int

    def __init__(
        self,
        pin: Any,
        *,
        data_ptr: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        element_bytes: int,
        device: tuple[int, int],
        touchable: bool,
    ) -> None:
        if not isinstance(pin, ffi.CData):
            raise TypeError("a view is made by KvCache.view, raw, pages or rows, or by Buffer.array")
        for name, value in (
            ("_pin", pin),
            ("_touchable", touchable),
            ("data_ptr", data_ptr),
            ("shape", shape),
            ("strides", strides),
            ("dtype", dtype),
            ("element_bytes", element_bytes),
            ("device_type", device[0]),
            ("device_id", device[1]),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a view does not change, and {name} is a part of it")

    @property
    def device(self) -> str:
        """Where the memory is, as PyTorch says it: `cpu`, or `cuda:0`."""
        return "cpu" if self.device_type == CPU else f"cuda:{self.device_id}"

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, self.device_id

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule over the same memory, which keeps it by itself. On a device it is for the caller
        to see to it that `stream` comes after the work that fills the memory."""
        if not self._touchable:
            raise BufferError("a ledger driver keeps books and has no memory; use a host or a CUDA driver")
        if copy:
            raise BufferError("a view is never copied by vattn; take it as it is, and copy that")
        if dl_device is not None and (int(dl_device[0]), int(dl_device[1])) != self.__dlpack_device__():
            raise BufferError(
                f"the memory is on {self.device}, and {dl_device} was asked for; take it as it is"
            )
        if self.device_type == CPU and stream is not None:
            raise BufferError(f"stream is {stream!r}, and the processor's memory has none; pass None")
        version = int(max_version is not None and max_version[0] >= 1)
        array = sized("vattn_array")
        array.data = ffi.cast("void *", self.data_ptr)
        array.dtype = DTYPES[self.dtype]
        array.ndim = len(self.shape)
        shape, strides = ffi.new("int64_t[]", self.shape), ffi.new("int64_t[]", self.strides)
        array.shape, array.strides = shape, strides
        out = ffi.new("void **")
        check(lib.vattn_pin_dlpack(self._pin, array, version, out))
        return _capsule(int(ffi.cast("uintptr_t", out[0])), CAPSULES[version], _unconsumed)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.device_type != CPU or not self._touchable:
            raise AttributeError(f"a view in {self._place()} has no array interface")
        return {
            "version": 3,
            "shape": self.shape,
            "strides": tuple(stride * self.element_bytes for stride in self.strides),
            "typestr": TYPESTRS[self.dtype],
            "data": (self.data_ptr, False),
        }

    def numpy(self) -> Any:
        """A NumPy array over the same memory, on the host. bfloat16 and the 8-bit floats have ml_dtypes'
        types where that is installed, else they are the bits: uint16 or uint8."""
        if self.device_type != CPU or not self._touchable:
            raise TypeError(f"NumPy can't reach {self._place()}; use DLPack with a library that can")
        try:
            import numpy
        except ImportError:
            raise ImportError("NumPy is not installed; install it with: pip install numpy") from None
        array = numpy.asarray(self)
        if self.dtype in BITS:
            try:
                import ml_dtypes
            except ImportError:
                return array
            array = array.view(getattr(ml_dtypes, self.dtype))
        return array

    def _place(self) -> str:
        return (
            f"memory of {self.device}"
            if self._touchable
            else "the addresses of a ledger driver, which has no memory"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a View belongs to its process and can't be pickled; copy what it shows")

    def __repr__(self) -> str:
        return f"<vattn.View {list(self.shape)} of {self.dtype} on {self.device}>"


# Functions of Python's C interface, apart from what others declare them to be.
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# The library's own: no Python can run while an exception is on its way, as when a consumer has failed.
_unconsumed = int(ffi.cast("uintptr_t", ffi.addressof(lib, "vattn_dlpack_capsule_destroy")))

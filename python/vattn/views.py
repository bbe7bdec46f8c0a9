"""Views: a layer's keys or values as strided arrays, for NumPy, PyTorch, JAX, CuPy and kernels."""

from __future__ import annotations

from typing import Any

from vattn._call import names
from vattn._native import ffi
from vattn.geometry import DTYPE_NAMES

DEVICES = names("vattn_device_type", "VATTN_DEVICE_")
CPU = DEVICES["cpu"]
#: How NumPy names an element; what it has no name for goes as bits.
TYPESTRS = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float8_e4m3fn": "|u1",
    "float8_e5m2": "|u1",
    "int8": "|i1",
    "uint8": "|u1",
}
BITS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class View:
    """An array over a cache's memory. `shape` and `strides` are in elements, the last stride is 1.

    Its addresses stay while it lives, and while anything lives that was made from it.
    """

    __slots__ = ("__weakref__", "_keeps", "_touchable", "data_ptr", "device_id", "device_type", "dtype", "element_bytes",
                 "shape", "strides")  # fmt: skip

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

    @property
    def device(self) -> str:
        """Where the memory is, as PyTorch says it: `cpu`, or `cuda:0`."""
        return "cpu" if self.device_type == CPU else f"cuda:{self.device_id}"

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.device_type != CPU or not self._touchable:
            raise AttributeError(f"a view in memory of {self.device} has no array interface")
        return {
            "version": 3,
            "shape": self.shape,
            "strides": tuple(stride * self.element_bytes for stride in self.strides),
            "typestr": TYPESTRS[self.dtype],
            "data": (self.data_ptr, False),
        }

    def numpy(self) -> Any:
        """A NumPy array over the same memory, on the host. bfloat16 and the 8-bit floats have ml_dtypes' types
        where that is installed, else they are the bits: uint16 or uint8."""
        import numpy

        if self.device_type != CPU or not self._touchable:
            raise TypeError(f"the memory is of {self.device}, where NumPy can't reach it; use DLPack")
        array = numpy.asarray(self)
        if self.dtype in BITS:
            try:
                import ml_dtypes
            except ImportError:
                return array
            array = array.view(getattr(ml_dtypes, self.dtype))
        return array

    def __repr__(self) -> str:
        return f"<vattn.View {list(self.shape)} of {self.dtype} on {self.device}>"


def view_of(struct: Any, keeps: Any, *, touchable: bool) -> View:
    """A view of what a struct says."""
    view = View()
    view._keeps = keeps
    view._touchable = touchable
    view.data_ptr = int(ffi.cast("uintptr_t", struct.data))
    view.shape = tuple(struct.shape)
    view.strides = tuple(struct.strides)
    view.dtype = DTYPE_NAMES[struct.dtype]
    view.element_bytes = struct.element_bytes
    view.device_type = struct.device_type
    view.device_id = struct.device_id
    return view

"""A vattn cache from Python, through the crate in `bridge/` and ctypes, as arrays without a copy.

Owns the crossing: C structures, errors, and views of addresses that may have no memory behind them.
Nothing here touches the memory, so a view over unbacked addresses is harmless until somebody reads it.

The library is looked for in VATTN_BRIDGE, beside this file or in its `bin`, and where cargo builds.
"""

import ctypes
import json
import math
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "libvattn_bridge.so"
UNLIMITED = 1 << 46
KEY, VALUE = 0, 1
BY_SLOT, BY_PAGE, BY_TOKEN = 0, 1, 2


class BridgeError(Exception):
    """What the library said."""


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in
                ("layers", "kv_heads", "key_dim", "value_dim", "slots", "page_tokens", "tile_tokens", "mapper")]
    _fields_ += [(name, ctypes.c_uint64) for name in ("max_tokens", "budget", "granule", "capacity")]


class Facts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("tensors", "granule", "stride_tokens", "pages_per_slot")]


class Tensor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("addr", "row", "slot_stride", "size")]


class View(ctypes.Structure):
    """A strided array of bf16: first address, shape and strides in elements."""

    _fields_ = [("addr", ctypes.c_uint64), ("_shape", ctypes.c_uint64 * 4), ("_strides", ctypes.c_uint64 * 4)]

    @property
    def shape(self):
        return tuple(self._shape)

    @property
    def strides(self):
        return tuple(self._strides)

    def address(self, *coordinates):
        """Where an element is."""
        return self.addr + 2 * sum(at * stride for at, stride in zip(coordinates, self.strides))


def find_library():
    named = os.environ.get("VATTN_BRIDGE")
    target = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target"))
    folders = (HERE, HERE / "bin", target / "release", target / "debug")
    places = [Path(named)] if named else [folder / NAME for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise BridgeError(f"{NAME} is not at {', '.join(map(str, places))}; build it with `cargo build -p vattn-bridge`, "
                      "or name it in VATTN_BRIDGE")


def load_library():
    library = ctypes.CDLL(str(find_library()))
    number, handle = ctypes.c_uint32, ctypes.c_void_p
    wide, text = ctypes.c_uint64, ctypes.c_char_p
    pointer = ctypes.POINTER
    calls = {
        "error": (text, []),
        "open": (handle, [text, text, pointer(Options)]),
        "close": (None, [handle]),
        "facts": (ctypes.c_int32, [handle, pointer(Facts)]),
        "tensor": (ctypes.c_int32, [handle, number, pointer(Tensor)]),
        "view": (ctypes.c_int32, [handle, number, number, number, pointer(View)]),
        "acquire": (ctypes.c_int32, [handle, wide, pointer(number)]),
        "step": (ctypes.c_int32, [handle, ctypes.c_size_t, pointer(number), pointer(wide)]),
        "prefetch": (ctypes.c_int32, [handle, ctypes.c_size_t, pointer(number), pointer(wide)]),
        "reclaim": (ctypes.c_int32, [handle, wide]),
        "trim": (ctypes.c_int32, [handle, wide]),
        "flush": (ctypes.c_int32, [handle]),
        "snapshot": (text, [handle]),
        "retire": (ctypes.c_int32, [handle, number]),
        "set_budget": (ctypes.c_int32, [handle, wide]),
        "need": (ctypes.c_int32, [handle, wide, pointer(wide)]),
        "backed": (ctypes.c_int32, [handle, number, number, pointer(wide)]),
    }
    for name, (result, arguments) in calls.items():
        call = getattr(library, f"bridge_{name}")
        call.restype, call.argtypes = result, arguments
    return library


class Cache:
    """A cache of bf16, and what of it is mapped."""

    def __init__(self, device, *, layers, kv_heads, key_dim, slots, max_tokens, value_dim=None, layout="sliced",
                 tile_tokens=1, page_tokens=16, budget=UNLIMITED, mapper=False, granule=2 << 20, capacity=1 << 30):
        self._library = load_library()
        self.layers, self.slots, self.max_tokens, self.page_tokens = layers, slots, max_tokens, page_tokens
        options = Options(layers=layers, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim or key_dim,
                          slots=slots, page_tokens=page_tokens, tile_tokens=tile_tokens, max_tokens=max_tokens,
                          budget=budget, mapper=mapper, granule=granule, capacity=capacity)
        self._handle = self._library.bridge_open(device.encode(), layout.encode(), ctypes.byref(options))
        if not self._handle:
            raise BridgeError(self._library.bridge_error().decode())
        self.facts = self._ask("facts", Facts)
        self.tensors = [self._ask("tensor", Tensor, number) for number in range(self.facts.tensors)]

    def _call(self, name, *arguments):
        if getattr(self._library, f"bridge_{name}")(self._handle, *arguments) != 0:
            raise BridgeError(self._library.bridge_error().decode())

    def _ask(self, name, kind, *arguments):
        answer = kind()
        self._call(name, *arguments, ctypes.byref(answer))
        return answer

    def close(self):
        """Gives everything back; the device must be done with it."""
        if self._handle:
            self._library.bridge_close(self._handle)
            self._handle = None

    def acquire(self, hint=0):
        return self._ask("acquire", ctypes.c_uint32, hint).value

    def acquire_all(self):
        """Every slot there is; their indices are 0 to slots - 1."""
        taken = sorted(self.acquire() for _ in range(self.slots))
        assert taken == list(range(self.slots)), taken
        return taken

    def _call_with(self, name, tokens):
        count = len(tokens)
        slots = (ctypes.c_uint32 * count)(*tokens.keys())
        totals = (ctypes.c_uint64 * count)(*tokens.values())
        self._call(name, count, slots, totals)

    def step(self, tokens):
        """`tokens` says for each slot how many it now holds in all."""
        self._call_with("step", tokens)

    def prefetch(self, tokens):
        """`tokens` says for each slot how many it will soon hold in all."""
        self._call_with("prefetch", tokens)

    def reclaim(self, size=UNLIMITED):
        """What holds nobody's tokens is unmapped, until so many bytes are free."""
        self._call("reclaim", size)

    def trim(self, keep=0):
        """Memory is given back, until so many bytes are held."""
        self._call("trim", keep)

    def flush(self):
        """Waits until the mapper has done what it was asked for."""
        self._call("flush")

    def snapshot(self):
        """What is counted."""
        return json.loads(self._library.bridge_snapshot(self._handle))

    def step_exactly(self, tokens):
        """The first step of these slots, with a budget that leaves nothing to round up with: what is
        mapped is what they need and no granule more."""
        self._call("set_budget", sum(map(self.need, tokens.values())))
        self.step(tokens)

    def retire(self, slot):
        self._call("retire", slot)

    def need(self, tokens):
        """Bytes over all tensors that a slot of so many tokens needs."""
        return self._ask("need", ctypes.c_uint64, tokens).value

    def backed_bytes(self, slot, tensor):
        """Bytes mapped from a slot's start in a tensor; refused where that is more than needed."""
        return self._ask("backed", ctypes.c_uint64, slot, tensor).value

    def past_tokens(self, slot, tokens):
        """Tokens past so many that are mapped for a slot, whole or in part, in whichever tensor has most."""
        def past(number, row):
            return math.ceil((self.backed_bytes(slot, number) - tokens * row) / row)

        return max(past(number, tensor.row) for number, tensor in enumerate(self.tensors))

    def view(self, layer, part, kind=BY_SLOT):
        return self._ask("view", View, layer, part, kind)

    def mapped(self):
        """For each slot and tensor the first address and the bytes that are mapped from it on."""
        for slot in range(self.slots):
            for number, tensor in enumerate(self.tensors):
                yield tensor.addr + slot * tensor.slot_stride, self.backed_bytes(slot, number)

    def pages(self, slot, tokens):
        """The identity page table of a slot."""
        first = slot * self.facts.pages_per_slot
        return range(first, first + math.ceil(tokens / self.page_tokens))


# NumPy, for the host.


class _Located:
    def __init__(self, addr, shape, strides, kind):
        self.__array_interface__ = {
            "version": 3, "typestr": kind, "data": (addr, False), "shape": tuple(shape),
            "strides": tuple(2 * stride for stride in strides),
        }


def numpy_array(addr, shape, strides, kind="<u2"):
    """Memory of this machine as an array of 2-byte elements."""
    import numpy
    return numpy.asarray(_Located(addr, shape, strides, kind))


# PyTorch, for the device. An array goes through DLPack: `__cuda_array_interface__` would have torch ask
# the runtime about the pointer, which fails where nothing is mapped.


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("dtype", _DLDataType), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_CAPSULE_NAME = b"dltensor"
_CPU, _CUDA = 1, 2
_TYPES = {"bfloat16": _DLDataType(4, 16, 1), "int16": _DLDataType(0, 16, 1)}
_exported = []


def torch_tensor(addr, shape, strides, dtype="bfloat16", device=0):
    """Device memory as a tensor (host memory with `device=None`), backed or not."""
    from torch.utils.dlpack import from_dlpack

    count = len(shape)
    shape, strides = (ctypes.c_int64 * count)(*shape), (ctypes.c_int64 * count)(*strides)
    managed = _DLManagedTensor()
    managed.dl_tensor = _DLTensor(addr, _CPU if device is None else _CUDA, device or 0, count, _TYPES[dtype],
                                  shape, strides, 0)
    # Torch reads them for as long as the tensor lives, and nothing tells when that ends.
    _exported.append((managed, shape, strides))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return from_dlpack(new(ctypes.addressof(managed), _CAPSULE_NAME, None))


def torch_view(view):
    return torch_tensor(view.addr, view.shape, view.strides)


def fill_mapped(cache, value=-1):
    """Sets every 16 bits that are mapped to `value`: -1 is NaN in bf16."""
    for addr, size in cache.mapped():
        torch_tensor(addr, (size // 2,), (1,), "int16").fill_(value)

"""What a model keeps for each token: its layers, their heads and widths, and the type of an element."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn._call import U32, Owned, check, choice, number, sized, text
from vattn._native import ffi, lib

#: The types of elements, by the names that NumPy, PyTorch and JAX have for them.
DTYPES: dict[str, int] = {
    "float32": lib.VATTN_DTYPE_F32,
    "float16": lib.VATTN_DTYPE_F16,
    "bfloat16": lib.VATTN_DTYPE_BF16,
    "float8_e4m3fn": lib.VATTN_DTYPE_F8_E4M3,
    "float8_e5m2": lib.VATTN_DTYPE_F8_E5M2,
    "int8": lib.VATTN_DTYPE_I8,
    "uint8": lib.VATTN_DTYPE_U8,
}
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
ELEMENT_BYTES: dict[int, int] = {value: int(TYPESTRS[name][2:]) for name, value in DTYPES.items()}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}


def dtype_number(value: Any) -> int:
    """The number of a type that is given by name, or as NumPy's, PyTorch's or JAX's object. None is the
    model's own."""
    if value is None:
        return int(lib.VATTN_DTYPE_MODEL)
    name = value
    if not isinstance(value, str):
        name = (
            getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).rpartition(".")[2]
        )
    if name not in DTYPES:
        choice("dtype", value if isinstance(value, str) else str(value), DTYPES)
    return DTYPES[name]


@dataclass(frozen=True)
class Layers:
    """Successive layers that keep the same for each token.

    `kv_heads` counts KV heads, not query heads; 0 for layers that keep one latent vector of `key_dim`
    elements, its rotary part included (MLA), whose `value_dim` is 0. Dimensions are in elements.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Geometry(Owned):
    """A model's layers in model order, or one rank's part of them. Never changes.

    KV heads are divided between `tensor_parallel` ranks. Where there are fewer heads than ranks each rank
    keeps one, and a latent is kept whole by every rank.
    """

    def __init__(self, layers: Iterable[Layers], *, dtype: Any = None, tensor_parallel: int = 1) -> None:
        groups = list(layers)
        for group in groups:
            if not isinstance(group, Layers):
                raise TypeError(f"layers has {group!r}; it has to be a list of vattn.Layers")
        array = ffi.new("vattn_layers[]", len(groups))
        for place, group in zip(array, groups, strict=True):
            for field in ("layers", "kv_heads", "key_dim", "value_dim"):
                setattr(place, field, number(field, getattr(group, field), U32))
        out = ffi.new("vattn_geometry **")
        check(lib.vattn_geometry_create(array, len(groups), *_split(tensor_parallel, dtype), out))
        self._made(out[0])

    @classmethod
    def preset(cls, name: str, *, tensor_parallel: int = 1, dtype: Any = None) -> Geometry:
        """A model by name, such as `llama-3-8b`. An unknown name fails with a list of those that are
        known."""
        out = ffi.new("vattn_geometry **")
        check(lib.vattn_geometry_create_preset(text("name", name), *_split(tensor_parallel, dtype), out))
        return cls._of(out[0])

    @classmethod
    def from_hf_config(cls, config: Any, *, tensor_parallel: int = 1, dtype: Any = None) -> Geometry:
        """The model that a Hugging Face configuration describes: the path of a `config.json`, its contents
        as a mapping, or a configuration object of transformers.

        What would make layers keep something else than the common fields say is refused and never guessed.
        """
        if isinstance(config, (str, os.PathLike)):
            path = Path(config)
            contents = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
        elif isinstance(config, Mapping):
            contents = json.dumps(dict(config), default=lambda value: str(value).removeprefix("torch."))
        elif callable(getattr(config, "to_json_string", None)):
            contents = config.to_json_string(use_diff=False)
        else:
            raise TypeError(
                f"config is a {type(config).__name__}; give the path of a config.json, a mapping, or a "
                "configuration object of transformers"
            )
        out = ffi.new("vattn_geometry **")
        check(
            lib.vattn_geometry_create_from_hf_config(
                text("config", contents), *_split(tensor_parallel, dtype), out
            )
        )
        return cls._of(out[0])

    @classmethod
    def _of(cls, handle: Any) -> Geometry:
        self = cls.__new__(cls)
        self._made(handle)
        return self

    def _made(self, handle: Any) -> None:
        self._own(handle, lib.vattn_geometry_destroy)
        info = sized("vattn_geometry_info")
        check(lib.vattn_geometry_describe(handle, info))
        #: How many layers keep something.
        self.layers: int = info.layers
        #: The type of an element, such as `bfloat16`.
        self.dtype: str = DTYPE_NAMES[info.dtype]
        #: Bytes that one token takes in all layers, with no rounding.
        self.bytes_per_token: int = info.bytes_per_token

    def layer(self, index: int) -> Layers:
        """What one layer keeps."""
        out = ffi.new("vattn_layers *")
        check(lib.vattn_geometry_layer(self._handle, number("layer", index, U32), out))
        return Layers(out.layers, out.kv_heads, out.key_dim, out.value_dim)

    def tile_tokens(self, kernel: str) -> int:
        """The `tile_tokens` that a cache of this model needs for a kernel, such as `fa3-decode`, in tokens.

        For several kernels take the least common multiple. `vattn.kernels()` lists them.
        """
        out = ffi.new("uint32_t *")
        check(lib.vattn_geometry_tile_tokens(self._handle, text("kernel", kernel), out))
        return int(out[0])

    def __repr__(self) -> str:
        return f"<vattn.Geometry of {self.layers} layers, {self.dtype}, {self.bytes_per_token} bytes a token>"


def _split(tensor_parallel: Any, dtype: Any) -> tuple[int, int]:
    return number("tensor_parallel", tensor_parallel, U32), dtype_number(dtype)

"""What is known by name: models, and kernels with how far each reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vattn._call import string
from vattn._native import lib


@dataclass(frozen=True)
class Preset:
    """A model, whole, all of its layers alike: its name for `Geometry.preset`, whose model it is, its
    dimensions in elements, and the bytes that a token takes in all layers. Where layers keep a latent,
    `key_dim` is its elements, and `kv_heads` and `value_dim` are 0."""

    name: str
    description: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    bytes_per_token: int


@dataclass(frozen=True)
class Tile:
    """`tokens` are what `tile_tokens` is to be a multiple of, for heads of up to these widths in these
    types."""

    dtypes: tuple[str, ...]
    key_dim: int
    value_dim: int
    tokens: int


@dataclass(frozen=True)
class Latent:
    """A latent of `dim` elements, and as heads of which widths a kernel looks it up."""

    dim: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Kernel:
    """An attention kernel, called in one way: its name for `Geometry.tile_tokens`, how it is called, and how
    it is known how far it reads: `evidence` (`measured` or `source`) and `source`.

    One that is `exact` reads nothing past a length, and needs a tile of 1. Of any other the first of its
    `tiles` counts that has the type and is wide enough.
    """

    name: str
    summary: str
    evidence: str
    source: str
    exact: bool
    tiles: tuple[Tile, ...]
    latents: tuple[Latent, ...]


def presets() -> list[Preset]:
    """The models that `Geometry.preset` knows."""
    return [_filled(Preset, entry) for entry in _catalog()["presets"]]


def kernels() -> list[Kernel]:
    """The kernels that `Geometry.tile_tokens` knows."""
    return [_filled(Kernel, entry) for entry in _catalog()["kernels"]]


def _catalog() -> dict[str, Any]:
    return dict(json.loads(string(lib.vattn_catalog_json)))


def _filled(kind: type[Any], entry: dict[str, Any]) -> Any:
    """A dataclass of what an object has; what a newer library has more is left out."""
    values = {name: entry[name] for name in kind.__dataclass_fields__}
    if kind is Kernel:
        values["tiles"] = tuple(_filled(Tile, tile) for tile in values["tiles"])
        values["latents"] = tuple(_filled(Latent, latent) for latent in values["latents"])
    if kind is Tile:
        values["dtypes"] = tuple(values["dtypes"])
    return kind(**values)

"""What a cache and a driver count, as dataclasses with the names of the C structs. Sizes are in bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from vattn._call import names
from vattn._native import ffi

HEALTH = {number: name.removeprefix("vattn_") for name, number in names("vattn_health", "VATTN_").items()}
T = TypeVar("T")


def read(kind: type[T], struct: Any) -> T:
    """A dataclass of what a struct has in the fields of the same names."""
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = getattr(struct, field.name)
        if field.name == "health":
            value = HEALTH[value]
        elif field.type == "CallStats":
            value = read(CallStats, value)
        elif field.type == "bool":
            value = bool(value)
        elif field.name == "name":
            value = ffi.string(value).decode()
        elif field.name == "data":
            value = int(ffi.cast("uintptr_t", value))
        values[field.name] = value
    return kind(**values)


@dataclass(frozen=True)
class Memory:
    """A device's memory in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class CallStats:
    """Calls of the driver: how many there were, how many failed, and how long they took in all."""

    calls: int
    failed: int
    nanoseconds: int


@dataclass(frozen=True)
class Bytes:
    """How much memory is used for what, in bytes. `held = mapped + parked + free_bytes + quarantined`, but
    for what is being moved at this moment.

    `needed` is what the tokens of the slots in use fill, with no rounding; `mapped` the extents under them;
    `parked` the extents that hold nobody's tokens, `ahead` of them those that were mapped before a step
    needed them; `free_bytes` what is created and mapped nowhere; `quarantined` what the driver would not let
    go of; `pinned` what of `mapped` views keep; `held` all of it; `budget` what may be held at most.
    """

    needed: int
    mapped: int
    parked: int
    ahead: int
    free_bytes: int
    quarantined: int
    held: int
    budget: int
    pinned: int


@dataclass(frozen=True)
class Stats:
    """Everything that a cache counts, at one moment. `KvCache.stats_json` has more.

    `health` is `healthy`, `degraded` or `failed`. Slots: those that a request has, those that nobody has and
    that still have memory, and how many requests can have. Then steps, slots acquired, adopted (acquired with
    memory in them) and retired; extents reclaimed, resized and mapped ahead; operations rolled back; failures
    in the background, drops that were refused, calls that returned an error; and calls of the driver: all,
    and those beside the path of requests; and `pins`, the views and tensors of it that are alive.
    """

    health: str
    active_slots: int
    parked_slots: int
    max_slots: int
    steps: int
    acquired: int
    adopted: int
    retired: int
    reclaimed: int
    resized: int
    rolled_back: int
    mapped_ahead: int
    background_failures: int
    refused_drops: int
    failures: int
    driver: CallStats
    background: CallStats
    pins: int


@dataclass(frozen=True)
class Live:
    """What is alive of a driver's: allocations, mappings, ranges of addresses, events."""

    handles: int
    mappings: int
    reservations: int
    events: int


@dataclass(frozen=True)
class Layout:
    """How a cache's tensors lie: the same for its whole life.

    `slots` is the first dimension of every tensor, the spare one included, whose index is `spare_slot` (None
    where there is none). `stride_tokens` are the tokens from one slot to the next and `pages_per_slot` the
    pages, the same in all tensors. `granule` is the unit of mapping, `bytes_per_token` what one token takes
    in all tensors, `virtual_size` the bytes of addresses of all of them.
    """

    layers: int
    tensors: int
    slots: int
    spare_slot: int | None
    page_tokens: int
    tile_tokens: int
    pages_per_slot: int
    max_tokens: int
    stride_tokens: int
    granule: int
    bytes_per_token: int
    virtual_size: int


@dataclass(frozen=True)
class Tensor:
    """One range of addresses, as whoever registers memory with a network card wants it.

    `data` is its address and `size` its bytes, of all slots together; `slot_stride` the bytes from one slot
    to the next, `token_bytes` what a token takes in it. `layers` of the model's layers lie in it, from
    `first_layer` on. What no step has asked for has no memory behind it.
    """

    data: int
    size: int
    slot_stride: int
    token_bytes: int
    first_layer: int
    layers: int
    has_keys: bool
    has_values: bool
    device_type: int
    device_id: int


@dataclass(frozen=True)
class BufferInfo:
    """A buffer in numbers: its address, its bytes of addresses, the unit of allocation, and the bytes that
    are committed, and those that are allocated, in whole extents."""

    data: int
    size: int
    granule: int
    committed: int
    held: int
    device_type: int
    device_id: int


@dataclass(frozen=True)
class CudaDevice:
    """A device as CUDA describes it: compute capability, bytes of memory, the smallest and the recommended
    unit of allocation in bytes (0 without virtual memory), and what its allocations can do."""

    name: str
    major: int
    minor: int
    memory: int
    granule: int
    recommended_granule: int
    virtual_memory: bool
    exportable: bool
    rdma: bool
    fabric: bool

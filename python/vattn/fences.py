"""Fences: what tells that device work submitted earlier is done with memory.

Streams and events of PyTorch and CuPy are known by their attributes; neither is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vattn._call import number
from vattn._native import ffi, lib

STREAMS = ("cuda_stream", "ptr")
EVENTS = ("cuda_event", "ptr")
GIVE = "give vattn.IDLE, vattn.Stream(…), vattn.Event(…), or a stream or an event of PyTorch or CuPy"


def _handle(value: Any, kinds: tuple[str, ...], what: str) -> int:
    """The number of a CUDA object: given itself, or an attribute of an object that has one."""
    if isinstance(value, Stream | Event):
        return value.handle
    for kind in kinds:
        found = getattr(value, kind, None)
        if found is not None:
            return number(what, getattr(found, "value", found))
    if callable(protocol := getattr(value, "__cuda_stream__", None)) and kinds == STREAMS:
        return number(what, protocol()[1])
    try:
        return number(what, value)
    except TypeError:
        raise TypeError(
            f"{what} is {value!r}; give its handle as a whole number, or an object of PyTorch or CuPy"
        ) from None


@dataclass(frozen=True)
class Idle:
    """Nothing on the device uses the memory any more: after a synchronisation, or on the host."""


@dataclass(frozen=True, init=False)
class Stream:
    """All that is in a stream by now. 0 is CUDA's legacy default stream."""

    handle: int

    def __init__(self, stream: Any) -> None:
        object.__setattr__(self, "handle", _handle(stream, STREAMS, "stream"))


@dataclass(frozen=True, init=False)
class Event:
    """An event that was recorded. It may go after the call that it is given to. Prefer a stream."""

    handle: int

    def __init__(self, event: Any) -> None:
        handle = _handle(event, EVENTS, "event")
        if handle == 0:
            raise ValueError(
                "event is 0: it was never recorded; record it on the stream that used the memory"
            )
        object.__setattr__(self, "handle", handle)


IDLE = Idle()
Fence = Idle | Stream | Event


def fence(value: Any) -> Fence:
    """A fence, from itself or from another library's stream or event."""
    if isinstance(value, Idle | Stream | Event):
        return value
    if hasattr(value, "cuda_stream") or hasattr(value, "__cuda_stream__"):
        return Stream(value)
    if hasattr(value, "cuda_event"):
        return Event(value)
    if hasattr(value, "ptr"):
        return Event(value) if "Event" in type(value).__name__ else Stream(value)
    raise TypeError(f"{value!r} is no fence; {GIVE}")


def pack(values: tuple[Any, ...]) -> Any:
    """An array of fences, as C takes it."""
    array = ffi.new("vattn_fence[]", len(values))
    for place, value in zip(array, values, strict=True):
        known = fence(value)
        if isinstance(known, Stream):
            place.kind = lib.VATTN_FENCE_STREAM
            place.handle = ffi.cast("void *", known.handle)
        elif isinstance(known, Event):
            place.kind = lib.VATTN_FENCE_EVENT
            place.handle = ffi.cast("void *", known.handle)
    return array

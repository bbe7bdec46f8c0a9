"""Slots and their tokens, and how lists, buffers and batches of them reach the library.

What goes in is copied before the library reads it: another thread may write to a buffer meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattn._call import U64, allocate, number
from vattn._native import ffi

#: Bytes of an entry: u32 index, u32 cache, u64 generation, u64 tokens.
ENTRY = 24
WHOLE = frozenset("bBhHiIlLqQnN")
Live = Mapping[int, "Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's place in every tensor, with the proof that it is this request's.

    `index` is the number that kernels take, the first dimension's index in every tensor; `generation` says
    which of the index's successive requests this is.
    """

    index: int
    cache: int
    generation: int


class Batch:
    """Slots and their tokens in memory of its own, for a server's step: made once, counted on each time.

    `tokens` is a writable view of unsigned 64-bit integers, one for each slot: `batch.tokens[i] += 1`, or in
    NumPy `numpy.asarray(batch.tokens)[:] += 1`.
    """

    __slots__ = ("_array", "_count", "_slots", "_tokens")

    def __init__(self, slots: Iterable[Slot], lengths: Any = None) -> None:
        chosen = tuple(slots)
        for slot in chosen:
            if not isinstance(slot, Slot):
                raise TypeError(f"slots has {slot!r}; it has to be a list of vattn.Slot")
        counts = [0] * len(chosen) if lengths is None else integers("lengths", lengths)
        self._array, self._count = _packed(chosen, counts)
        self._slots = chosen
        words = memoryview(ffi.buffer(self._array, self._count * ENTRY)).cast("B")
        self._tokens = words.cast("Q")[2::3]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots, in order."""
        return self._slots

    @property
    def tokens(self) -> memoryview:
        """How many tokens each slot is to hold in all: writable, of the same order as the slots."""
        return self._tokens

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Slot, int]]:
        return iter(zip(self._slots, self._tokens.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"<vattn.Batch of {self._count} slots>"


def snapshot(source: Any, count: int) -> Any:
    """A copy of entries that nobody else writes to."""
    copy = allocate("vattn_slot_tokens[]", count)
    ffi.memmove(copy, source, count * ENTRY)
    return copy


def _packed(slots: Sequence[Slot], counts: Sequence[int]) -> tuple[Any, int]:
    if len(slots) != len(counts):
        raise ValueError(
            f"there are {len(slots)} slots and {len(counts)} lengths; give one length for each slot"
        )
    flat: list[int] = []
    for slot, tokens in zip(slots, counts, strict=True):
        try:
            flat += (slot.index, slot.cache, slot.generation, tokens)
        except AttributeError:
            raise TypeError(f"{slot!r} is no slot; give what KvCache.acquire returned") from None
    try:
        packed = struct.pack("=" + "IIQQ" * len(slots), *flat)
    except struct.error:
        for slot, tokens in zip(slots, counts, strict=True):
            if not isinstance(slot, Slot):
                raise TypeError(f"{slot!r} is no slot; give what KvCache.acquire returned") from None
            number("slot.index", slot.index, 2**32 - 1)
            number("slot.cache", slot.cache, 2**32 - 1)
            number("slot.generation", slot.generation)
            number("tokens", tokens)
        raise
    return snapshot(packed, len(slots)), len(slots)


def _buffer(value: Any) -> memoryview | None:
    """The buffer of an array, or of a tensor in the processor's memory."""
    if isinstance(value, list | tuple):
        return None
    try:
        return memoryview(value)
    except TypeError:
        pass
    convert: Callable[[], Any] | None = getattr(value, "numpy", None)
    return memoryview(convert()) if callable(convert) else None


def integers(name: str, value: Any) -> list[int]:
    """Whole numbers from 0 to 2^64 - 1: a list, or a buffer of one dimension of integers."""
    view = None if isinstance(value, str | bytes | bytearray) else _buffer(value)
    if view is not None:
        kind = view.format.lstrip("@=<")
        if view.ndim != 1 or kind not in WHOLE:
            raise TypeError(
                f"{name} is a buffer of {view.ndim} dimensions and format {view.format!r}; "
                "it has to be of one dimension and of integers"
            )
        numbers = list(struct.unpack(f"@{len(view)}{kind}", view.tobytes()))
    elif isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it has to be a list or a buffer of whole numbers")
    else:
        numbers = list(value)
    for place, whole in enumerate(numbers):
        if type(whole) is not int or not 0 <= whole <= U64:
            numbers[place] = number(f"{name}[{place}]", whole)
    return numbers


def entries(first: Any, lengths: Any, live: Live) -> tuple[Any, int]:
    """Slots and their tokens as C takes them, from any form in which they may be given.

    A `Batch`; a mapping or pairs of slots and tokens; slots and lengths, each a list or a buffer, where slots
    may also be indices of this cache's slots in use; or a buffer of entries of 24 bytes.
    """
    if lengths is None:
        if isinstance(first, Batch):
            return snapshot(first._array, first._count), first._count
        view = _buffer(first)
        if view is not None:
            return _from_buffer(view)
        return _from_pairs(first)
    return _packed(slots(first, live), integers("lengths", lengths))


def slots(value: Any, live: Live) -> list[Slot]:
    """Slots, from a list of them, or from the indices of slots in use."""
    if isinstance(value, Slot):
        raise TypeError(f"slots is {value!r}; it has to be a list of slots, or of their indices")
    view = _buffer(value)
    if view is None:
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            raise TypeError(f"slots is {value!r}; it has to be a list of slots, or of their indices")
        chosen = list(value)
        if all(type(slot) is Slot for slot in chosen):
            return chosen
        if any(isinstance(slot, Slot) for slot in chosen):
            raise TypeError("slots has both slots and other things; give slots alone, or their indices alone")
        indices = integers("slots", chosen)
    else:
        indices = integers("slots", value)
    found = [live.get(index) for index in indices]
    known = [slot for slot in found if slot is not None]
    if len(known) != len(found):
        wrong = indices[found.index(None)]
        raise ValueError(f"slots has index {wrong}, which no request has; give indices of slots in use")
    return known


def _from_buffer(view: memoryview) -> tuple[Any, int]:
    if not view.c_contiguous:
        raise TypeError("entries is a buffer with gaps; give one that is contiguous")
    row = view.itemsize * (view.shape or (1,))[-1] if view.ndim == 2 else view.itemsize
    whole = row == ENTRY or view.itemsize == 1
    if not whole or view.nbytes % ENTRY:
        raise TypeError(
            f"entries is a buffer of {view.nbytes} bytes in items of {view.itemsize}; an entry has {ENTRY} "
            "bytes: u32 index, u32 cache, u64 generation, u64 tokens. For lengths alone give slots as well"
        )
    count = view.nbytes // ENTRY
    return snapshot(ffi.from_buffer(view), count), count


def _from_pairs(value: Any) -> tuple[Any, int]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        chosen = [(slot, tokens) for slot, tokens in pairs]
    except (TypeError, ValueError):
        raise TypeError(
            f"entries is {value!r}; give pairs of a slot and its tokens, or slots and lengths"
        ) from None
    counts = integers("tokens", [tokens for _, tokens in chosen])
    return _packed([slot for slot, _ in chosen], counts)

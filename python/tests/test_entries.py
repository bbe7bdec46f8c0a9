"""Slots and lengths, in every form in which they may be given, and in those in which they may not."""

from __future__ import annotations

import array
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vattn

ENTRY = np.dtype([("index", "u4"), ("cache", "u4"), ("generation", "u8"), ("tokens", "u8")])


def packed(slots: list[vattn.Slot], lengths: list[int]) -> bytes:
    rows = zip(slots, lengths, strict=True)
    return b"".join(struct.pack("=IIQQ", s.index, s.cache, s.generation, n) for s, n in rows)


class Tensor:
    """As a tensor of PyTorch in the processor's memory: no buffer, but a way to NumPy."""

    def __init__(self, values: list[int]) -> None:
        self._values = values

    def numpy(self) -> Any:
        return np.array(self._values)


FORMS: dict[str, Callable[[list[vattn.Slot], list[int]], tuple[Any, ...]]] = {
    "pairs": lambda s, n: (list(zip(s, n, strict=True)),),
    "a generator": lambda s, n: (zip(s, n, strict=True),),
    "a mapping": lambda s, n: (dict(zip(s, n, strict=True)),),
    "lists": lambda s, n: (s, n),
    "NumPy's numbers": lambda s, n: (s, [np.int64(k) for k in n]),
    "int32": lambda s, n: (s, np.array(n, np.int32)),
    "uint64": lambda s, n: (s, np.array(n, np.uint64)),
    "every second": lambda s, n: (s, np.repeat(np.array(n), 2)[::2]),
    "array.array": lambda s, n: (s, array.array("l", n)),
    "a tensor": lambda s, n: (s, Tensor(n)),
    "indices": lambda s, n: (np.array([slot.index for slot in s], np.int32), np.array(n, np.int32)),
    "a list of indices": lambda s, n: ([slot.index for slot in s], n),
    "a batch": lambda s, n: (vattn.Batch(s, n),),
    "bytes": lambda s, n: (packed(s, n),),
    "misaligned": lambda s, n: (memoryview(b"x" + packed(s, n))[1:],),
    "records": lambda s, n: (np.frombuffer(packed(s, n), ENTRY),),
    "rows of words": lambda s, n: (np.frombuffer(packed(s, n), np.uint64).reshape(-1, 3),),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_takes(form: str, cache: vattn.KvCache) -> None:
    slots = [cache.acquire() for _ in range(5)]
    lengths = [10, 20, 30, 40, 50]
    cache.step(*FORMS[form](slots, lengths))
    assert [cache.view(slot, 0).shape[0] for slot in slots] == lengths
    assert cache.fits(*FORMS[form](slots, lengths)) == [True] * 5
    cache.prefetch(*FORMS[form](slots, lengths))


def test_a_batch_counts_in_place(cache: vattn.KvCache) -> None:
    slots = [cache.acquire() for _ in range(3)]
    batch = vattn.Batch(slots)
    assert len(batch) == 3 and batch.slots == tuple(slots)
    tokens = np.asarray(batch.tokens)
    tokens[:] = [1, 2, 3]
    batch.tokens[0] += 9
    cache.step(batch)
    tokens += 1
    cache.step(batch)
    assert [cache.view(slot, 0).shape[0] for slot in slots] == [11, 3, 4]
    assert list(batch) == list(zip(slots, [11, 3, 4], strict=True))
    with pytest.raises((TypeError, ValueError)):
        batch.tokens[0] = -1


def test_nothing_is_a_step(cache: vattn.KvCache) -> None:
    for nothing in ([], {}, b"", vattn.Batch([]), np.empty(0, ENTRY)):
        cache.step(nothing)
    cache.step([], [])
    assert cache.fits([]) == [] and cache.admits([]) == 0


BAD: list[tuple[Callable[[vattn.Slot], tuple[Any, ...]], type[Exception], str]] = [
    (lambda s: ([(s, -1)],), ValueError, r"tokens\[0\] is -1; it can be from 0"),
    (lambda s: ([(s, 2**64)],), ValueError, "18446744073709551616; it can be from 0 to 18446744073709551615"),
    (lambda s: ([(s, 1.5)],), TypeError, "1.5, a float"),
    (lambda s: ([(s, "x")],), TypeError, "'x', a str"),
    (lambda s: ([(s, True)],), TypeError, "True"),
    (lambda s: ([(s, None)],), TypeError, "None"),
    (lambda s: ([(0, 1)],), TypeError, "0 is no slot"),
    (lambda s: ([s],), TypeError, "give pairs"),
    (lambda s: (s,), TypeError, "give pairs"),
    (lambda s: (s, 5), TypeError, "list of slots"),
    (lambda s: (5,), TypeError, "give pairs"),
    (lambda s: ("ab",), TypeError, "no slot|give pairs"),
    (lambda s: (None,), TypeError, "give pairs"),
    (lambda s: ([s], 5), TypeError, "lengths is 5"),
    (lambda s: ([s], "5"), TypeError, "lengths is '5'"),
    (lambda s: ([s], [1, 2]), ValueError, "1 slots and 2 lengths"),
    (lambda s: ([s], np.array([1.0])), TypeError, "format 'd'"),
    (lambda s: ([s], np.array([[1]])), TypeError, "2 dimensions"),
    (lambda s: ([s], np.array([-1])), ValueError, "lengths.0. is -1"),
    (lambda s: ([s, 0], [1, 1]), TypeError, "both slots and other things"),
    (lambda s: ([7], [1]), ValueError, "index 7, which no request has"),
    (lambda s: (np.array([0.0]), [1]), TypeError, "format 'd'"),
    (lambda s: (np.array([1, 2, 3]),), TypeError, "an entry has 24 bytes"),
    (lambda s: (b"x" * 23,), TypeError, "23 bytes"),
    (lambda s: (np.zeros(4, ENTRY)[::2],), TypeError, "with gaps"),
    (lambda s: (np.array(object()),), TypeError, "24 bytes"),
    (lambda s: (vattn.Slot(2**32, 0, 0), 1), TypeError, "list of slots"),
    (lambda s: ([vattn.Slot(2**32, 0, 0)], [1]), ValueError, "slot.index is 4294967296"),
    (lambda s: ([vattn.Slot("a", 0, 0)], [1]), TypeError, "slot.index is 'a'"),
    (lambda s: ([vattn.Slot(10**6, s.cache, 1)], [1]), vattn.Error, "KvCache.step"),
    (lambda s: (np.full(1, 255, np.uint8).repeat(24),), vattn.Error, "KvCache.step"),
    (lambda s: ([(s, 1), (s, 2)],), vattn.DuplicateSlot, "twice"),
    (lambda s: ([(s, 5000)],), vattn.TooManyTokens, "4096"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
@pytest.mark.parametrize("verb", ["step", "fits", "prefetch"])
def test_what_is_no_entry_is_refused(case: int, verb: str, cache: vattn.KvCache) -> None:
    make, kind, text = BAD[case]
    slot = cache.acquire()
    text = text.replace("KvCache.step", f"KvCache.{verb}")
    if (verb, kind) == ("prefetch", vattn.DuplicateSlot):
        return cache.prefetch(*make(slot))
    with pytest.raises(kind, match=text):
        getattr(cache, verb)(*make(slot))
    assert cache.bytes().held == 0

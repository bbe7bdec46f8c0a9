"""How the library is called: statuses become exceptions, numbers are checked before cffi sees them, and
handles are given up once.

cffi releases the GIL in every call, so other threads run while one waits for the driver. Handles of the
library are no addresses: one that was closed is refused there, whichever thread comes late.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from vattn import errors
from vattn._native import ffi, lib

U32 = 2**32 - 1
U64 = 2**64 - 1
UNITS = {"": 0, "b": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40}
#: Python's names for what the library's texts name in C's.
CLASSES = {"cache": "KvCache", "driver": "Driver", "geometry": "Geometry", "buffer": "Buffer", "pin": "View"}
METHODS = {
    "create": "",
    "destroy": "close",
    "acquire_on": "acquire",
    "view": "raw",
    "paged_view": "pages",
    "token_view": "rows",
    "stats_json": "stats_json",
    "report_json": "report",
}
Own = TypeVar("Own", bound="Owned")

# Raw memory that is filled at once by whoever asks for it.
allocate = ffi.new_allocator(should_clear_after_alloc=False)


def names(enum: str, prefix: str) -> dict[str, int]:
    """The values of an enum of the header by what follows the prefix, in small letters."""
    values = sorted(ffi.typeof(f"enum {enum}").elements.items())
    return {name.removeprefix(prefix).lower(): number for number, name in values}


VERBS = names("vattn_verb", "VATTN_VERB_")
VERB_NAMES = {number: name for name, number in VERBS.items()}


def sized(kind: str) -> Any:
    """A struct that begins with its size, to be filled by the library."""
    struct = ffi.new(f"{kind} *")
    struct.struct_size = ffi.sizeof(struct[0])
    return struct


def check(status: int) -> None:
    """Raises what the calling thread's last call failed with, if it did."""
    if status:
        raise failure(status)


def failure(status: int) -> errors.Error:
    """The exception of this thread's last failure."""
    room = lib.vattn_last_error_message(ffi.NULL, 0) + 1
    buffer = ffi.new("char[]", room)
    lib.vattn_last_error_message(buffer, room)
    error = errors.CLASSES.get(status, errors.Error)(in_python(ffi.string(buffer).decode()), status)
    detail = sized("vattn_error")
    if lib.vattn_last_error(detail) == 0 and detail.verb >= 0:
        error.verb = VERB_NAMES.get(detail.verb, str(detail.verb))
        error.driver_code = detail.driver_code
        error.driver_name = ffi.string(detail.driver_name).decode()
        error.driver_bytes = detail.driver_bytes or None
    return error


def in_python(text: str) -> str:
    """A text of the library with Python's names for its functions."""

    def name(found: re.Match[str]) -> str:
        kind = CLASSES[found[1]]
        if found[2] is None:
            return kind
        made = re.fullmatch(r"create_(host|cuda|ledger|checked)", found[2])
        if made:
            return f"{made[1].capitalize()}Driver"
        verb = METHODS.get(found[2], found[2].removeprefix("create_"))
        return f"{kind}.{verb}" if verb else kind

    text = text.replace("has been destroyed; create another, and keep its handle", "was closed; make another")
    text = re.sub(r"\b(config|options)->", "", text.replace("config->extents", "commit"))
    text = text.replace("vattn_layout_plan", "plan")
    return re.sub(rf"\bvattn_({'|'.join(CLASSES)})(?:_(\w+))?\b", name, text)


def string(ask: Callable[[Any], int]) -> str:
    """A string that the library gives out."""
    out = ffi.new("char **")
    check(ask(out))
    try:
        return str(ffi.string(out[0]).decode())
    finally:
        lib.vattn_string_destroy(out[0])


def number(name: str, value: Any, limit: int = U64) -> int:
    """A whole number from 0 to the limit: an int, or whatever says that it is one (`__index__`)."""
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it has to be a whole number from 0 to {limit}")
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} is {value!r}, a {type(value).__name__}; it has to be a whole number from 0 to {limit}"
        ) from None
    if not 0 <= whole <= limit:
        raise ValueError(f"{name} is {whole}; it can be from 0 to {limit}")
    return whole


def size(name: str, value: Any) -> int:
    """A number of bytes: an int, or a text such as `64GiB` or `512MiB`. Decimal units are refused, because
    half of those who write GB mean GiB."""
    if not isinstance(value, str):
        try:
            return number(name, value)
        except TypeError:
            raise TypeError(
                f"{name} is {value!r}, a {type(value).__name__}; give bytes as a whole number, or a text "
                "such as '2GiB'"
            ) from None
    found = re.fullmatch(r"([0-9]+) *([a-z]*)", value.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(
            f"{name} is {value!r}, which is no size; write '2GiB', '512MiB' or a number of bytes"
        )
    return number(name, int(found[1]) << UNITS[found[2]])


def choice(name: str, value: Any, choices: dict[str, int]) -> int:
    """What a name stands for."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"{name} is {value!r}; it can be {', '.join(map(repr, choices))}"
        ) from None


def flag(name: str, value: Any) -> int:
    """A truth, as C takes it."""
    if getattr(value, "ndim", 0) or value not in (True, False):
        raise TypeError(f"{name} is {value!r}; it has to be True or False")
    return int(value)


def text(name: str, value: Any) -> bytes:
    """A string that the library can take."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it has to be a string")
    if "\0" in value:
        raise ValueError(f"{name} is {value!r}; it can't contain a NUL")
    return value.encode()


# What could not be given up where its last reference went: inside a log callback.
_later: deque[tuple[Callable[[Any], int], Any]] = deque()


def _give_up(destroy: Callable[[Any], int], handle: Any, process: int, forgotten: str | None) -> None:
    """The end of an object that nobody closed. In a child of fork it is the parent's."""
    if os.getpid() != process:
        return
    if destroy(handle) == errors.InCallback.status:
        _later.append((destroy, handle))
    if forgotten is not None:
        warnings.warn(
            f"{forgotten} was not closed; use `with`, or call close()", ResourceWarning, stacklevel=2
        )


def give_up_later_ones() -> None:
    """Gives up what could not be before."""
    with contextlib.suppress(IndexError):
        while True:
            destroy, handle = _later.popleft()
            destroy(handle)


def keep(
    handle: Any,
    destroy: Callable[[Any], int],
    # Bound here, since the end of the interpreter empties modules before the last object is gone.
    refused: int = errors.InCallback.status,
    later: Callable[[tuple[Callable[[Any], int], Any]], None] = _later.append,
) -> Any:
    """A handle that is given up with the last reference to it, silently, however late that is."""

    def give_up(handle: Any) -> None:
        if destroy(handle) == refused:
            later((destroy, handle))

    if _later:
        give_up_later_ones()
    return ffi.gc(handle, give_up)


class Owned:
    """What has a handle of the library and gives it up when it is closed or forgotten.

    Objects that are alive when the interpreter ends are left to the end of the process.
    """

    _handle: Any
    _destroy: Callable[[Any], int]
    _finalizer: weakref.finalize[Any, Any]

    def _own(self, handle: Any, destroy: Callable[[Any], int], forgotten: str | None = None) -> None:
        if _later:
            give_up_later_ones()
        self._handle = handle
        self._destroy = destroy
        self._watch(forgotten)

    def _watch(self, forgotten: str | None) -> None:
        self._finalizer = weakref.finalize(
            self, _give_up, self._destroy, self._handle, os.getpid(), forgotten
        )
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Gives it up. What was made from it keeps what it needs of it. Twice does nothing."""
        self._close()

    def _close(self) -> bool:
        watched = self._finalizer.detach()
        if watched is None:
            return False
        status = self._destroy(self._handle)
        if status:
            error = failure(status)
            if not isinstance(error, (errors.Forked, errors.InvalidHandle)):
                self._watch(watched[2][3])
            raise error
        return True

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} belongs to its process and can't be pickled or copied")

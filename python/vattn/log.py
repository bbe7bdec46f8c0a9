"""What the library logs, in Python's `logging`.

The library may speak from any thread and under its locks. So its callback only queues, and a thread hands the
records on: handlers may take their time, and may call the library.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from queue import SimpleQueue
from typing import Any

from vattn._call import check
from vattn._native import ffi, lib

#: Python's level for each of the library's, in order of importance.
LEVELS = {
    lib.VATTN_LOG_ERROR: logging.ERROR,
    lib.VATTN_LOG_WARN: logging.WARNING,
    lib.VATTN_LOG_INFO: logging.INFO,
    lib.VATTN_LOG_DEBUG: logging.DEBUG,
    lib.VATTN_LOG_TRACE: 5,
}
NAMES = {
    "off": None,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": 5,
}

_queue: SimpleQueue[tuple[int, bytes, bytes] | threading.Event | None] = SimpleQueue()
_lock = threading.Lock()
_logger = logging.getLogger("vattn")
_thread: threading.Thread | None = None


@ffi.callback("void(void *, int32_t, const char *, const char *)", onerror=lambda *_: True)  # type: ignore[untyped-decorator]
def _listen(_user: Any, level: int, target: Any, text: Any) -> None:
    with contextlib.suppress(BaseException):
        _queue.put((level, ffi.string(target), ffi.string(text)))


def _hand_on() -> None:
    while (item := _queue.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
            continue
        level, target, text = item
        with contextlib.suppress(Exception):
            part = target.decode(errors="replace")
            _logger.log(
                LEVELS.get(level, logging.ERROR),
                "%s: %s",
                part,
                text.decode(errors="replace"),
                extra={"part": part},
            )


def set_logging(level: int | str | None, logger: logging.Logger | None = None) -> None:
    """Has what the library logs told to a logger of Python's, `vattn` unless another is given.

    `level` is one of `logging`'s numbers, or `error`, `warning`, `info`, `debug`, `trace`; `off` and None end
    it. It is what the library is asked for; the logger's own level applies as well. Records have the part of
    the library that speaks as `part`. They arrive on a thread of their own.
    """
    global _logger
    least = _number(level)
    if logger is not None and not isinstance(logger, logging.Logger):
        raise TypeError(f"logger is {logger!r}; it has to be a logging.Logger")
    with _lock:
        _logger = logger or logging.getLogger("vattn")
        if least is None:
            _stop()
            return
        _start()
        chosen = max(number for number, python in LEVELS.items() if python >= least)
        check(lib.vattn_log_set(_listen, ffi.NULL, chosen))


def flush_logging() -> None:
    """Waits until all that was logged so far has been handed on."""
    thread = _thread
    if thread is not None and thread.is_alive() and threading.current_thread() is not thread:
        done = threading.Event()
        _queue.put(done)
        # Another thread may end logging meanwhile, and then nobody gets to it.
        while thread.is_alive() and not done.wait(0.1):
            pass


def _number(level: int | str | None) -> int | None:
    if isinstance(level, str):
        try:
            return NAMES[level.lower()]
        except KeyError:
            raise ValueError(f"level is {level!r}; it can be {', '.join(map(repr, NAMES))}") from None
    whole = isinstance(level, int) and not isinstance(level, bool)
    if level is None or (whole and 0 <= level <= logging.ERROR):
        return level
    raise (ValueError if whole else TypeError)(
        f"level is {level!r}; it can be a number from 0 to {logging.ERROR}, or {', '.join(map(repr, NAMES))}"
    )


def _start() -> None:
    global _thread
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_hand_on, name="vattn-log", daemon=True)
        _thread.start()


def _stop() -> None:
    """Tells nobody any more, once what was said so far has been handed on."""
    global _thread
    lib.vattn_log_set(ffi.NULL, ffi.NULL, lib.VATTN_LOG_OFF)
    thread, _thread = _thread, None
    if thread is not None and thread.is_alive():
        _queue.put(None)
        if threading.current_thread() is not thread:
            thread.join()


def _in_child() -> None:
    """After fork there is no thread that hands on: another is begun."""
    global _lock, _queue, _thread
    _lock = threading.Lock()
    _queue = SimpleQueue()
    if _thread is not None:
        _thread = None
        with contextlib.suppress(RuntimeError):
            _start()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

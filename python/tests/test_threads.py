"""Threads: who runs while a call waits, and what becomes of calls that come too late. And the log."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vattn
from vattn import log


def together(*works: Callable[[], Any]) -> None:
    """Runs them at once; what one raises is raised here."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def test_other_threads_run_while_a_call_waits(cache: vattn.KvCache, driver: vattn.HostDriver) -> None:
    slot = cache.acquire()
    cache.step({slot: 100})
    driver.hold(7)
    cache.retire(slot, vattn.Stream(7))
    cache.trim(0, vattn.Stream(7))
    held = cache.bytes().held
    waiting = threading.Thread(target=cache.flush)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive() and cache.bytes().held == held > 0
    driver.fire(7)
    waiting.join(10)
    assert not waiting.is_alive() and cache.bytes().held == 0


@pytest.mark.filterwarnings("ignore:a vattn.KvCache was closed while:ResourceWarning")
def test_a_cache_is_closed_under_threads_that_use_it(model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    for _ in range(20):
        cache = vattn.KvCache(model, driver, budget="16MiB", max_slots=8, max_tokens=4096)
        refused = []

        def serve(cache: vattn.KvCache = cache, refused: list[vattn.Error] = refused) -> None:
            try:
                while True:
                    slot = cache.acquire(100)
                    batch = vattn.Batch([slot], [100])
                    for _ in range(20):
                        batch.tokens[0] += 1
                        cache.step(batch)
                    view = cache.view(slot, 0).numpy()
                    view[:] = 1
                    cache.retire(slot, vattn.IDLE)
                    assert (view[:1] == view[:1]).all()
            except vattn.InvalidHandle as error:
                refused.append(error)

        def close(cache: vattn.KvCache = cache) -> None:
            time.sleep(0.01)
            cache.close()

        together(serve, serve, serve, close, close)
        assert len(refused) == 3


def test_one_slot_in_many_threads_is_refused_or_served(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    batch = vattn.Batch([slot], [1])

    def step() -> None:
        for _ in range(200):
            try:
                batch.tokens[0] += 1
                cache.step(batch)
                cache.view(slot, 0).numpy()[:1] = 1
            except (vattn.SlotBusy, vattn.FewerTokens):
                pass

    together(step, step, step, step)
    assert cache.report()["slots"]


def test_arrays_go_in_any_thread_and_order(cache: vattn.KvCache) -> None:
    slot = cache.acquire()
    cache.step({slot: 50})

    def work() -> None:
        for round in range(100):
            view = cache.view(slot, round % 3)
            made = [view.numpy(), np.from_dlpack(view), view.__dlpack__(), view]
            made[0][0] = round
            del view
            made.pop(round % len(made))
            del made

    together(work, work, work)
    gc.collect()
    assert cache.stats().pins == 0


@pytest.fixture
def records() -> Any:
    """A logger, and what it was told."""
    told: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record)

    logger = logging.Logger("test", logging.DEBUG)
    logger.addHandler(Keep())
    yield logger, told
    vattn.set_logging("off")


def test_messages_reach_a_logger(records: Any, model: vattn.Geometry, driver: vattn.HostDriver) -> None:
    logger, told = records
    vattn.set_logging("info", logger)
    with vattn.KvCache(model, driver, budget="4MiB"):
        vattn.flush_logging()
        assert [record.levelno for record in told] == [logging.INFO]
        assert told[0].part.startswith("vattn") and told[0].part in told[0].getMessage()
        vattn.set_logging(logging.WARNING, logger)
    vattn.set_logging(None)
    with vattn.KvCache(model, driver, budget="4MiB"):
        pass
    vattn.flush_logging()
    assert len(told) == 1


def test_a_handler_may_fail_and_may_call_the_library(
    records: Any, model: vattn.Geometry, driver: vattn.HostDriver
) -> None:
    logger, told = records
    found = []

    class Curious(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(vattn.probe()["version"])
            raise RuntimeError("a handler that fails")

    logger.addHandler(Curious())
    vattn.set_logging("debug", logger)
    for _ in range(2):
        with vattn.KvCache(model, driver, budget="4MiB") as cache:
            cache.set_budget("2MiB")
    vattn.flush_logging()
    assert len(told) >= 4 and found == [vattn.__version__] * len(told)


@pytest.mark.parametrize(
    ("level", "kind"),
    [("loud", ValueError), (True, TypeError), (1.5, TypeError), (-1, ValueError), (99, ValueError)],
)
def test_levels_that_are_none_are_refused(level: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="level is"):
        vattn.set_logging(level)
    with pytest.raises(TypeError, match="logger is"):
        vattn.set_logging("info", "root")


def test_a_flush_returns_though_logging_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(queue.SimpleQueue[Any]):
        def put(self, item: Any, *_: Any, **__: Any) -> None:
            if isinstance(item, threading.Event):
                vattn.set_logging(None)
            super().put(item)

    monkeypatch.setattr(log, "_queue", Late())
    vattn.set_logging("debug")
    flush = threading.Thread(target=vattn.flush_logging, daemon=True)
    flush.start()
    flush.join(timeout=10)
    assert not flush.is_alive()

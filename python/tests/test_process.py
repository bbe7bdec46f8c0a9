"""Processes of their own: what is imported, what a child of fork finds, and how the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from world import ROOT

BEGIN = """
import gc, os, sys, threading
import numpy as np
import vattn

model = vattn.Geometry([vattn.Layers(2, 2, 32, 32)], dtype="float32")
driver = vattn.HostDriver("64MiB", granule="64KiB")
cache = vattn.KvCache(model, driver, budget="4MiB", max_slots=8, max_tokens=4096)
slot = cache.acquire()
cache.step({slot: 100})
view = cache.view(slot, 0)
array, other = view.numpy(), np.from_dlpack(view)
array[:] = 1
buffer = vattn.Buffer("1MiB", driver)
"""


def python(program: str, *options: str, begin: str = BEGIN) -> str:
    """What a program prints, which has to end well and say nothing else."""
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        *options,
        "-c",
        begin + textwrap.dedent(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT / "python" / "tests")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_nothing_is_imported_that_was_not_asked_for() -> None:
    program = """
        import sys, vattn
        cache = vattn.KvCache(vattn.Geometry.preset("llama-3-8b"), vattn.HostDriver("64MiB"), max_slots=2)
        cache.raw(0).__dlpack__()
        print([name for name in ("numpy", "torch", "transformers", "jax", "cupy", "ml_dtypes") if name in sys.modules])
        cache.close()
    """
    assert python(program, begin="") == "[]\n"


ENDS = {
    "with all of it alive": "",
    "with capsules": "capsules = [view.__dlpack__() for _ in range(3)]",
    "with cycles": "cache.me = cache; buffer.me = [view, cache]; array_of = {'x': array, 'c': cache}",
    "with a log": "vattn.set_logging('trace'); import logging; logging.disable(); cache.set_budget('3MiB')",
    "with a closed cache": "import warnings; warnings.simplefilter('ignore'); cache.close()",
    "with a held stream": """
        driver.hold(5)
        cache.retire(slot, vattn.Stream(5))
        cache.trim(0, vattn.Stream(5))
    """,
    "with threads": """
        def serve():
            while True:
                slot = cache.acquire()
                cache.step([(slot, 50)])
                cache.view(slot, 0).numpy()[:] = 2
                cache.retire(slot, vattn.IDLE)
        for _ in range(3):
            threading.Thread(target=serve, daemon=True).start()
        vattn.set_logging('trace')
    """,
    "with an exception": "import atexit; atexit.register(lambda: None); del cache, driver, model",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_silently(end: str) -> None:
    python(ENDS[end])


def test_a_child_is_refused_what_is_its_parents_and_can_make_its_own() -> None:
    program = """
        process = os.fork()
        if process == 0:
            refused = 0
            for call in (lambda: cache.step({slot: 101}), cache.stats, cache.close, buffer.info, buffer.close,
                         lambda: model.layer(0), driver.memory, driver.close, lambda: cache.raw(0), view.__dlpack__):
                try:
                    call()
                except vattn.Forked as error:
                    assert isinstance(error, RuntimeError)
                    refused += 1
            print(refused, flush=True)
            del array, other, view, cache, buffer, driver
            gc.collect()
            driver = vattn.HostDriver("64MiB", granule="64KiB")
            model = vattn.Geometry([vattn.Layers(2, 2, 32, 32)], dtype="float32")
            with vattn.KvCache(model, driver, budget="4MiB") as cache:
                slot = cache.acquire()
                cache.step({slot: 10})
                cache.view(slot, 0).numpy()[:] = 1
            print("made", flush=True)
            sys.exit(0)
        assert os.waitpid(process, 0)[1] == 0
        cache.step({slot: 101})
        assert (array == 1).all()
        cache.retire(slot, vattn.IDLE)
        del array, other, view
        cache.close()
        buffer.close()
        print("parent")
    """
    assert python(program, "-W", "error::ResourceWarning") == "10\nmade\nparent\n"


def test_a_child_that_just_ends_says_nothing() -> None:
    program = """
        vattn.set_logging("trace")
        process = os.fork()
        if process == 0:
            sys.exit(0)
        assert os.waitpid(process, 0)[1] == 0
    """
    python(program, "-W", "always::ResourceWarning")


def test_multiprocessing_can_fork_around_a_cache() -> None:
    program = """
        import multiprocessing
        def work(number):
            return number * 2
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(work, range(3)))
        cache.step({slot: 200})
    """
    assert python(program) == "[0, 2, 4]\n"


def test_what_was_forgotten_is_told_of_by_name() -> None:
    program = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del buffer, cache
            gc.collect()
        print(sorted(str(warning.message).split(" was")[0] for warning in caught))
        print((array == 1).all())
    """
    assert python(program) == "['a vattn.Buffer', 'a vattn.KvCache']\nTrue\n"


def test_an_array_goes_while_another_thread_logs() -> None:
    """Whoever drops a tensor holds the GIL, and the log's callback wants it under locks of the cache: a process
    of its own, since what hangs here can't be ended from inside."""
    program = """
        import logging, time
        logging.disable()
        del array, other, view
        cache.close()
        options = {"budget": "4MiB", "max_slots": 8, "max_tokens": 4096, "background": "off", "reclaim": "eager"}
        cache = vattn.KvCache(model, driver, **options)
        vattn.set_logging("trace")
        sys.setswitchinterval(10)  # a thread keeps the GIL until it calls the library

        def resize():
            while not done.is_set():
                cache.set_budget("4MiB")

        done = threading.Event()
        other = threading.Thread(target=resize)
        other.start()
        for _ in range(100):
            slot = cache.acquire(500)
            cache.step({slot: 500})
            array = np.from_dlpack(cache.view(slot, 0))
            cache.retire(slot, vattn.IDLE)
            sum(range(10_000))
            del array
        done.set()
        other.join()
        while cache.stats().pins:
            time.sleep(0.01)
        cache.close()
        buffer.close()
        print("done")
    """
    assert python(program) == "done\n"

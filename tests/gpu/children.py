"""Work in child processes: a fault on the device kills the CUDA context of the process that caused it.

Children are forked, so that what the parent has imported costs them nothing. The parent must not have
touched the device. Each child writes its answer, one JSON value, into a file of its own; what it prints
goes into another.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

TAIL = 2000


class Children:
    """Runs `work(task)` in up to `jobs` children at a time."""

    def __init__(self, folder, jobs, deadline):
        self.folder, self.jobs, self.deadline = Path(folder), jobs, deadline
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count = 0

    def run(self, work, tasks, seconds):
        """Yields `(task, answer)` as they end. A child that dies, or takes longer than `seconds`, answers
        `{"died": what it printed last}`, and so does a task for which no time was left."""
        waiting, running = list(reversed(tasks)), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs and time.monotonic() < self.deadline:
                    task = waiting.pop()
                    pid, place = self._start(work, task)
                    running[pid] = (task, place, min(time.monotonic() + seconds, self.deadline))
                if waiting and not running:
                    yield waiting.pop(), {"died": "no time was left for it"}
                    continue
                yield from self._reap(running)
                time.sleep(0.02)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _start(self, work, task):
        self._count += 1
        place = self.folder / f"{self._count:03}"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._child(work, task, place)
        return pid, place

    @staticmethod
    def _child(work, task, place):
        status = 1
        try:
            log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            answer = work(task)
            place.with_suffix(".json").write_text(json.dumps(answer))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # No clean-up: after a fault it would only fail, or hang.
            os._exit(status)

    @staticmethod
    def _reap(running):
        for pid, (task, place, until) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() > until
            if not ended and late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if not ended and not late:
                continue
            del running[pid]
            answer = place.with_suffix(".json")
            if ended and status == 0 and answer.is_file():
                yield task, json.loads(answer.read_text())
                continue
            log = place.with_suffix(".log")
            said = log.read_text(errors="replace")[-TAIL:] if log.is_file() else ""
            how = "took too long" if late and not ended else f"status {status}"
            yield task, {"died": f"{how}\n{said}"}

"""Worker processes that read, check and convert, under a time limit for each file.

Neither a thread nor a pool of the standard library can give up on one file: a decoder that hangs or crashes would take
the mix with it. Here a worker that is silent for too long is ended and replaced, the file it was at is reported, and
the files behind it go to another worker. Workers are fresh interpreters that talk over a socket pair: nothing is
inherited from a program that may have threads, and nothing runs the caller's main module again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from llavanext_cli.errors import DataError, LlavaNextError

_BOOT = (
    "import sys; fd = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; "
    "from llavanext_cli.mixing.pool import serve; serve(fd)"
)


_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(8 << 20),
}
"""glibc keeps what is freed and asks the kernel for no fresh pages with every chunk: a tenth of a worker's time."""


@dataclass(frozen=True)
class Lost:
    """An item whose worker was ended ("timeout") or died ("crashed") while at it."""

    reason: str


@dataclass
class _Task:
    key: Any
    function: str
    items: Sequence[Any]
    time_limit: float | None
    base: int = 0
    """Items of the submitted task that lie before these."""


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    task: _Task | None = None
    done: int = 0
    since: float = 0.0
    is_ready: bool = False
    """It has started and prepared itself; only then do time limits count."""


class Pool:
    """Runs functions of one module in `count` processes, as a context manager.

    Args:
        module: dotted name; `module.prepare(context)` runs once in every worker, and returns what is passed to each
            function as its first argument.
        context: picklable.
        count: workers, at least 1.
        inherited: descriptors that workers find under the same numbers.
    """

    def __init__(self, module: str, context: Any, count: int, inherited: Sequence[int] = ()):
        self._module, self._context, self.count, self._inherited = module, context, count, inherited
        self._workers: list[_Worker] = []
        self._urgent: deque[_Task] = deque()
        self._queue: deque[_Task] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._urgent and all(worker.task is None for worker in self._workers)

    def start(self, count: int) -> None:
        """Start up to `count` workers now, where there will be work for them: loading decoders takes half a second."""
        while len(self._workers) < min(count, self.count):
            self._start()

    def submit(
        self, key: Any, function: str, items: Sequence[Any], time_limit: float | None = None, urgent: bool = False
    ) -> None:
        """Queue `function(prepared, item)` for every item, on one worker. `time_limit` is in seconds for each item."""
        if len(items):
            (self._urgent if urgent else self._queue).append(_Task(key, function, items, time_limit))

    def results(self) -> Iterator[tuple[Any, int, Any]]:
        """Yield (key, index of the item, result or `Lost`) as they come, until nothing is queued or running.

        More may be submitted while iterating.
        """
        while not self.is_idle:
            self._hand_out()
            busy = {worker.connection: worker for worker in self._workers if worker.task}
            ready = wait(list(busy), timeout=self._patience(busy.values()))
            for connection in ready:
                yield from self._receive(busy[connection])
            for worker in busy.values():
                if worker.connection not in ready and self._is_late(worker) and not worker.connection.poll():
                    yield self._replace(worker, "timeout")

    def _hand_out(self) -> None:
        free = [worker for worker in self._workers if worker.task is None]
        while self._urgent or self._queue:
            if not free:
                if len(self._workers) >= self.count:
                    return
                free.append(self._start())
            worker = free.pop()
            worker.task = (self._urgent or self._queue).popleft()
            worker.done, worker.since = 0, time.monotonic()
            with contextlib.suppress(OSError):  # it is gone; reading from it will tell
                worker.connection.send((worker.task.function, worker.task.items))

    def _receive(self, worker: _Worker) -> Iterator[tuple[Any, int, Any]]:
        try:
            outcome, value = worker.connection.recv()
        except (EOFError, OSError):
            yield self._replace(worker, "crashed")
            return
        if outcome == "ready":
            worker.is_ready, worker.since = True, time.monotonic()
            return
        task = worker.task
        if outcome == "fault":
            raise value[0](*value[1:])
        if outcome == "bug":
            raise RuntimeError(f"a worker failed:\n{value}")
        index = task.base + worker.done
        worker.done += 1
        worker.since = time.monotonic()
        if worker.done == len(task.items):
            worker.task = None
            self._hand_out()  # before the caller is busy with the result
        yield task.key, index, value

    def _replace(self, worker: _Worker, reason: str) -> tuple[Any, int, Any]:
        task, done = worker.task, worker.done
        self._end(worker)
        self._workers.remove(worker)
        if task.time_limit is None:
            raise DataError(
                "a worker process died while it read records",
                "was it ended for want of memory? Try fewer --workers",
            )
        rest = task.items[done + 1 :]
        if rest:
            self._queue.appendleft(_Task(task.key, task.function, rest, task.time_limit, task.base + done + 1))
        return task.key, task.base + done, Lost(reason)

    @staticmethod
    def _is_late(worker: _Worker) -> bool:
        limit = worker.task.time_limit if worker.task and worker.is_ready else None
        return limit is not None and time.monotonic() - worker.since > limit

    @staticmethod
    def _patience(workers: Any) -> float | None:
        limits = [w.since + w.task.time_limit for w in workers if w.is_ready and w.task.time_limit is not None]
        return max(0.0, min(limits) - time.monotonic()) + 0.01 if limits else None

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), *(path or os.getcwd() for path in sys.path)],
                pass_fds=[theirs.fileno(), *self._inherited],
                env=_ALLOCATOR | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for us, and we end them
            )
        worker = _Worker(process, Connection(ours.detach()))
        self._workers.append(worker)
        worker.connection.send((self._module, self._context))
        return worker

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.connection.close()
        with contextlib.suppress(OSError):
            worker.process.kill()
        worker.process.wait()


def serve(fd: int) -> None:
    """The life of a worker: receive (function, items), answer each item, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(fd)
    try:
        name, context = connection.recv()
        module = importlib.import_module(name)
        prepared = module.prepare(context)
        connection.send(("ready", None))
        # Decoders complain on stderr in their own words; what matters comes back as a verdict.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        while True:
            function, items = connection.recv()
            for item in items:
                connection.send(("done", getattr(module, function)(prepared, item)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except LlavaNextError as fault:
        connection.send(("fault", (type(fault), fault.what, fault.hint, fault.details)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))

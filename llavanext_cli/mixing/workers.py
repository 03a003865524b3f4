"""Worker processes, by Pebble: it ends a task at its time limit, and a crash of one process costs one task.

A pool of the standard library can do neither, and a damaged file can hang a decoder or crash it. Workers are fresh
interpreters (spawned): nothing is inherited from a program that may have threads.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import multiprocessing
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import pebble

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.conversion import SLOT_BYTES, Context, Converted, Job, convert, start_worker

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class TaskLostError(Exception):
    """A task reached its time limit ("timeout"), or its process died ("crashed"): `reason` says which."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class WorkerPool:
    """`number` worker processes that share `context`. A context manager; at its end, unfinished tasks are dropped."""

    def __init__(self, context: Context, number: int):
        self.lookahead = 2 * number + 12
        """Chunks that are under way at a time: they bound the memory of a mix."""
        self._shared = os.memfd_create("llavanext-mix")
        os.ftruncate(self._shared, self.lookahead * SLOT_BYTES)
        self._lines = memoryview(mmap.mmap(self._shared, 0))
        self._pool = pebble.ProcessPool(
            number,
            initializer=start_worker,
            initargs=[context, f"/proc/{os.getpid()}/fd/{self._shared}"],
            context=multiprocessing.get_context("spawn"),
        )
        self._futures: weakref.WeakSet[Future] = weakref.WeakSet()
        self._switch_interval = sys.getswitchinterval()

    def __enter__(self) -> WorkerPool:
        sys.setswitchinterval(0.0005)  # Pebble's threads pass tasks on, and must not wait 5 ms for this one
        # Ctrl-C reaches the whole process group. It is for this thread: workers and Pebble's threads inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            _ = self._pool.active  # starts it
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._switch_interval)
        # Stopping a worker while it starts, as one that replaces another, would write a traceback to the terminal.
        end = self._pool.close if all(future.done() for future in self._futures) else self._pool.stop
        end()
        self._pool.join()
        os.close(self._shared)

    def submit(
        self, function: Callable[[Argument], Result], argument: Argument, time_limit: float | None = None
    ) -> Future[Result]:
        """Start a task; `time_limit` is in seconds, from when a worker begins it. Pass the future to `wait`."""
        future = self._pool.schedule(function, args=[argument], timeout=time_limit)
        self._futures.add(future)
        return future

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Yield (job, result) in the order of `jobs`, while workers are a few jobs ahead.

        Raises:
            DataError: a worker process died.
        """
        under_way: deque[tuple[Job, Future[Result]]] = deque()
        try:
            for job in jobs:
                under_way.append((job, self.submit(function, job)))
                if len(under_way) == self.lookahead:
                    first, future = under_way.popleft()
                    yield first, wait(future)
            for job, future in under_way:
                yield job, wait(future)
        except TaskLostError as error:
            raise DataError(
                "a worker process died while it read records",
                "if the system ended it because memory ran out, use fewer --workers",
            ) from error

    def convert(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Converted]]:
        """Yield converted chunks in the order of `jobs`. Errors as `map`."""
        placed = (job._replace(slot=number % self.lookahead) for number, job in enumerate(jobs))
        for job, converted in self.map(convert, placed):
            if converted.shared:
                begin = job.slot * SLOT_BYTES
                converted.body = self._lines[begin : begin + converted.shared]  # until the slot's next job is submitted
            yield job, converted


def wait(future: Future[Result]) -> Result:
    """The result of a task.

    Raises:
        TaskLostError: it reached its time limit, or its process died.
    """
    try:
        return future.result()
    except concurrent.futures.TimeoutError as error:
        raise TaskLostError("timeout") from error
    except (pebble.ProcessExpired, BrokenProcessPool) as error:
        raise TaskLostError("crashed") from error

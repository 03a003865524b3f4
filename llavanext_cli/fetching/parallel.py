"""A few threads that work through a list of tasks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from llavanext_cli.fetching.remote import StoppedError

PATIENCE = 3.0
"""Seconds that threads get to notice that they are to stop."""


def run_all(
    tasks: Iterable[Callable[[], None]], jobs: int, stop: threading.Event, tick: Callable[[], None] = lambda: None
) -> None:
    """Run every task, `jobs` at a time. After the first error, or Ctrl-C, set `stop` and raise it.

    The threads are daemons, and not those of a ThreadPoolExecutor: Python would wait at its exit for a download inside
    huggingface_hub, which nothing can interrupt, for as long as it takes.

    Args:
        tick: called about five times a second in this thread, to show the progress.
    """
    waiting = deque(tasks)
    faults: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                task = waiting.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as fault:
                faults.append(fault)
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(waiting)))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and not stop.is_set():
            for thread in threads:
                thread.join(0.2 / len(threads))
            tick()
    finally:
        if any(thread.is_alive() for thread in threads):
            stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    tick()
    causes = [fault for fault in faults if not isinstance(fault, StoppedError)] or faults
    if causes:
        raise causes[0]

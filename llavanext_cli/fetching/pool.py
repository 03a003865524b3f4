"""A few threads that work through a list, and end quickly when one fails or somebody presses Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from llavanext_cli.fetching.net import Net, StoppedError

PATIENCE = 5.0
"""Seconds that threads get to notice that they are to stop."""


def run_all(net: Net, tasks: Iterable[Callable[[], None]], jobs: int) -> None:
    """Run every task, `jobs` at a time; on the first fault stop the others and raise it.

    The threads are daemons: a transfer that cannot be interrupted (xet's) does not keep the program alive.

    Raises:
        Whatever the first task to fail raised, or KeyboardInterrupt; `net.stop` is set in both cases.
    """
    waiting = deque(tasks)
    lock = threading.Lock()
    faults: list[BaseException] = []

    def work() -> None:
        while not net.stop.is_set():
            with lock:
                if not waiting:
                    return
                task = waiting.popleft()
            try:
                task()
            except BaseException as fault:
                with lock:
                    faults.append(fault)
                net.stop.set()
                return

    threads = [
        threading.Thread(target=work, name=f"fetch-{number}", daemon=True) for number in range(min(jobs, len(waiting)))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # short, so that Ctrl-C is noticed
                if net.stop.is_set():
                    break
    except BaseException:
        net.stop.set()
        _join(threads)
        raise
    _join(threads)
    with lock:
        causes = [fault for fault in faults if not isinstance(fault, StoppedError)] or faults
    if causes:
        raise causes[0]
    if net.stop.is_set():
        raise StoppedError


def _join(threads: list[threading.Thread]) -> None:
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

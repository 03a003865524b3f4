"""How commands end when they receive a signal: by an exception, so that whatever they have begun is cleaned up.

raise_on_termination()  around a command: SIGTERM and SIGHUP raise, as Ctrl-C does
route_sigint()          around a command that runs MindSpore, which replaces Python's handler by its own whenever it
                        compiles or runs a graph; that one ends the process without any clean-up
defer_signals()         around what must not be interrupted halfway: signals wait until it is done
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

TERMINATING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def raise_on_termination(
    raised: Callable[[int], BaseException] = lambda number: SystemExit(128 + number),
) -> Iterator[None]:
    """Raise at SIGTERM (a scheduler) and SIGHUP (a closed terminal), so that the block can clean up.

    Args:
        raised: makes the exception from the number of the signal; the default ends the command with code 143 or 129.
    """

    def leave(number: int, frame: object) -> None:
        raise raised(number)

    if threading.current_thread() is not threading.main_thread():  # our caller handles signals
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def route_sigint() -> Iterator[None]:
    """Block SIGINT in this thread and all that it starts, so that no library's handler runs; one thread waits for it.

    Enter this before importing libraries that start threads, as NumPy does.
    """
    if threading.current_thread() is not threading.main_thread():  # our caller handles signals
        yield
        return
    main, over = threading.get_ident(), threading.Event()

    def forward() -> None:
        while signal.sigwait({signal.SIGINT}) and not over.is_set():
            _thread.interrupt_main(signal.SIGINT)
            signal.pthread_kill(main, signal.SIGURG)  # wakes it while it waits for a key or a socket

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    watcher = threading.Thread(target=forward, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        assert watcher.ident is not None  # it was started
        signal.pthread_kill(watcher.ident, signal.SIGINT)
        watcher.join()
        signal.signal(signal.SIGURG, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Handle signals after the block: an exception in an import or a compilation would leave MindSpore broken.

    Handlers that MindSpore installs within the block are removed, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {}
    for number in TERMINATING:
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number in reversed(before):  # SIGINT last: the program may continue after it
            signal.signal(number, before[number])
        if received:
            before[signal.Signals(received[-1])](received[-1], None)

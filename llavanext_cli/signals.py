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

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def raise_on_termination(
    raised: Callable[[int], BaseException] = lambda number: SystemExit(128 + number),
) -> Iterator[None]:
    """SIGTERM of a scheduler, and SIGHUP of a terminal that is closed, raise within, so that everything is tidied up.

    Args:
        raised: makes the exception of the signal's number; by default the command ends with code 143, or 129.
    """

    def leave(number: int, frame: object) -> None:
        raise raised(number)

    if threading.current_thread() is not threading.main_thread():  # whoever runs us there handles signals
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
    """SIGINT is blocked here and in every thread that begins here, so that nobody's handler runs; one waits for it.

    Enter this before libraries are imported that start threads, as NumPy does.
    """
    if threading.current_thread() is not threading.main_thread():  # whoever runs us there handles signals
        yield
        return
    main, over = threading.get_ident(), threading.Event()

    def pass_on() -> None:
        while signal.sigwait({signal.SIGINT}) and not over.is_set():
            _thread.interrupt_main(signal.SIGINT)
            signal.pthread_kill(main, signal.SIGURG)  # wakes it where it waits for a key or a socket

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    watcher = threading.Thread(target=pass_on, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        assert watcher.ident is not None, "it was started"
        signal.pthread_kill(watcher.ident, signal.SIGINT)
        watcher.join()
        signal.signal(signal.SIGURG, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """What Python does at a signal waits: an exception in the middle of an import or a compilation leaves MindSpore in
    pieces. Afterwards its handlers are gone, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {}
    for number in ENDING:
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number in reversed(before):  # SIGINT last: what follows may go on after it
            signal.signal(number, before[number])
        if came:
            before[signal.Signals(came[-1])](came[-1], None)

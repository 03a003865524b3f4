"""Ctrl-C beside MindSpore, which puts a handler of its own in the place of Python's whenever it compiles or runs a
graph; that one ends the process by SIGTERM, and nothing is tidied.

    caught()    around a command: no thread takes SIGINT but one, which passes it on to Python's own handler
    held()      around what must not be left halfway: signals wait until it is through
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def caught() -> Iterator[None]:
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
def held() -> Iterator[None]:
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

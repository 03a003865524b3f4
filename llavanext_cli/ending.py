"""How commands end when they are told to: by an exception, so that whatever they have begun is tidied up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def tidied_when_ended(
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

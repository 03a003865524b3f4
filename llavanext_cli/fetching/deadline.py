"""Connections whose answers must begin in time: a server that sends its headers byte by byte is not waited for.

The socket's own timeout starts anew with every byte, so a timer shuts the socket down.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

TIMES = 2
"""The headers may take so many times the timeout of a single byte."""


class _Timed:
    """The part that both kinds of connection share."""

    timeout: Any
    sock: Any

    def getresponse(self) -> Any:
        late = threading.Event()

        def end() -> None:
            late.set()
            with suppress(OSError, AttributeError):
                self.sock.shutdown(2)

        timer = threading.Timer(TIMES * self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()
            if late.is_set():  # what had come by then looks like a whole head
                raise TimeoutError("timed out")


class _Connection(_Timed, HTTPConnection):
    pass


class _SecureConnection(_Timed, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


POOLS = {"http": _Pool, "https": _SecurePool}
"""For a urllib3 PoolManager's `pool_classes_by_scheme`."""

"""The threads of one download: each takes a piece of what is missing, and the next one when it is done.

They start one after another, and only while the line is slow: where a single connection brings what a disk can take, a
second one competes with it and with the digest for processors, and makes the download slower.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.net import StoppedError

if TYPE_CHECKING:
    from llavanext_cli.fetching.transfer import Transfer

RAMP_SECONDS = 0.25
"""Between two connections."""
FAST = 100 << 20
"""Bytes a second from which on no further connection is opened."""


class Crew:
    """Threads that take pieces of the holes until none is left. One that fails leaves its piece to the others."""

    def __init__(self, transfer: Transfer, descriptor: int, holes: deque[tuple[int, int]], piece: int):
        self.transfer, self.descriptor, self.holes, self.piece = transfer, descriptor, holes, piece
        self.changed = threading.Condition()
        self.working = 0
        self.alive = 0
        self.fault: BaseException | None = None
        self.given_up: FetchError | None = None

    def work(self, connections: int) -> None:
        """Raises what stopped the last thread, or what no other thread could help with."""
        try:
            self._ramp_up(connections)
        except BaseException:  # too many open files, or threads; or Ctrl-C
            self.transfer.cancelled.set()
            raise
        if self.fault is not None:
            raise self.fault

    def _ramp_up(self, connections: int) -> None:
        """Start threads while there is reason to, and wait for all of them."""
        with self.changed:
            started, ramped, before = 0, -RAMP_SECONDS, 0
            while self.alive or (self.holes and not started):
                now, received = time.monotonic(), self.transfer.received
                may_start = self.holes and started < connections and self.fault is None
                if may_start and now - ramped >= RAMP_SECONDS:
                    if not started or received - before < FAST * (now - ramped):
                        self._start(started)
                        started += 1
                    ramped, before = now, received
                self.changed.wait(RAMP_SECONDS / 2)
                if self.transfer.net.stop.is_set():
                    raise StoppedError

    def _start(self, number: int) -> None:
        # A descriptor for each thread: one that outlives this call must not write to a number used anew.
        descriptor = os.dup(self.descriptor)
        try:
            threading.Thread(target=self._run, args=(descriptor,), name=f"range-{number}", daemon=True).start()
        except RuntimeError:
            os.close(descriptor)
            raise
        self.alive += 1  # the thread itself waits for the lock that is held here

    def _run(self, descriptor: int) -> None:
        try:
            while (piece := self._next()) is not None:
                try:
                    self.transfer.receive_piece(descriptor, *piece)
                except FetchError as fault:
                    with self.changed:
                        if self.alive == 1:
                            raise
                        # Some servers allow few connections: the others go on with what is missing.
                        self.given_up = fault
                        holes = [(max(a, piece[0]), min(b, piece[1])) for a, b in self.transfer.journal.missing()]
                        self.holes.extend((a, b) for a, b in holes if a < b)
                        return
                finally:
                    with self.changed:
                        self.working -= 1
                        self.changed.notify_all()
        except BaseException as fault:
            self.transfer.cancelled.set()
            with self.changed:
                if self.fault is None or isinstance(self.fault, StoppedError):
                    self.fault = fault
        finally:
            os.close(descriptor)
            with self.changed:
                self.alive -= 1
                if self.alive == 0 and self.holes and self.fault is None:
                    self.fault = self.given_up  # all of them gave up at the same time
                self.changed.notify_all()

    def _next(self) -> tuple[int, int] | None:
        """The next piece; waits while others work, since one of theirs may come back."""
        with self.changed:
            while True:
                if self.fault is not None or self.transfer.net.stop.is_set():
                    return None
                if self.holes:
                    self.working += 1
                    start, end = self.holes.popleft()
                    if end - start > self.piece:
                        self.holes.appendleft((start + self.piece, end))
                    return start, min(end, start + self.piece)
                if self.working == 0:
                    return None
                self.changed.wait(0.2)

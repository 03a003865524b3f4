"""Memory that the main process shares with its workers: what a worker writes need not go through a socket.

    slot   0           1           2                    one for each chunk that is under way
           [####------][##--------][----------] ...     a worker puts the lines of a chunk, the main process takes them

A socket holds a part of a chunk, so that a worker would wait in the middle of sending it for a busy main process.
"""

from __future__ import annotations

import os
import tempfile

SLOT_BYTES = 4 << 20
"""Lines of a chunk beyond this go through the socket; most take a megabyte. A slot keeps its memory to the end, and
there are `Pipeline.window` of them."""


class Spool:
    """A file without a name, in memory where the system has such. A context manager.

    Attributes:
        fd: its descriptor, which workers inherit under the same number.
    """

    def __init__(self) -> None:
        try:
            self.fd = os.memfd_create("llavanext-mix")
        except (AttributeError, OSError):  # another system, or a sandbox that forbids it
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def take(self, slot: int, length: int) -> bytes:
        """The `length` bytes that a worker has put into `slot`."""
        data = os.pread(self.fd, length, slot * SLOT_BYTES)
        if len(data) != length:
            raise RuntimeError(f"slot {slot} holds {len(data)} bytes, and a worker has put {length} into it")
        return data


def put(fd: int, slot: int, data: bytes) -> bool:
    """Write `data` into a slot; False where it does not fit."""
    if len(data) > SLOT_BYTES:
        return False
    try:
        return os.pwrite(fd, data, slot * SLOT_BYTES) == len(data)
    except OSError:  # no room: the socket is slower, and will do
        return False

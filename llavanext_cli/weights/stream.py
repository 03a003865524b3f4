"""Moves tensors from files to files, a buffer at a time: memory does not grow with the model.

    pieces of a tensor ──read──▶ buffer ──write──▶ new file
                                   └──▶ SHA-256, in a second thread

A tensor is planned as the pieces it is made of, in order: byte ranges of source files, or bytes made on the way. So
stacking q, k and v is naming three ranges, and nothing is ever parsed into an array.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import DTYPE_BYTES, OPEN_MORE, build_header, count_elements

BUFFER_BYTES = 1 << 20
"""Fits the cache between reading, digesting and writing. Writes of 8 MB took four times as long on ext4."""
BUFFERS = 8
OPEN_FILES = 16
"""Sources that are kept open; a model may have hundreds of files, and a process 1024 of all kinds."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extent:
    """Bytes `offset` to `offset + nbytes` of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Made:
    """Bytes that are computed on the way: `chunks()` yields `nbytes` bytes in all. A chunk is digested in another
    thread while the next is made, so its memory must not be written again."""

    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `dtype` is a safetensors name; the pieces add up to the bytes of its shape; `origin` says
    in words what it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Extent | Made, ...]
    origin: str = ""

    def __post_init__(self) -> None:
        there = sum(piece.nbytes for piece in self.pieces)
        if there != self.nbytes:
            raise ValueError(f"{self.name}: {there} bytes planned for {self.dtype}{list(self.shape)}")

    @property
    def nbytes(self) -> int:
        return count_elements(self.shape) * DTYPE_BYTES[self.dtype]


class Stream:
    """Copies pieces and digests them on the way. Use as a context manager.

    Args:
        total: bytes that will be copied in all, for `progress(done, total)`.
    """

    def __init__(self, total: int, progress: Progress | None = None):
        self.done, self.total, self.progress = 0, total, progress
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(memoryview(bytearray(BUFFER_BYTES)))
        # a chunk, its digest and the buffer to give back; an event to set; None is the end
        self._work: queue.Queue[tuple[hashlib._Hash, memoryview, memoryview | None] | threading.Event | None] = (
            queue.Queue(maxsize=BUFFERS)
        )
        self._thread = threading.Thread(target=self._digest_all, name="digest", daemon=True)
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()
        while self._open:
            os.close(self._open.popitem()[1])

    def _digest_all(self) -> None:
        while (item := self._work.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            digest, chunk, buffer = item
            digest.update(chunk)
            if buffer is not None:
                self._free.put(buffer)

    def copy(self, piece: Extent | Made, write: Callable[[memoryview], None] | None, digest: hashlib._Hash) -> None:
        """Read a piece; hand every chunk to `write` (None only digests) and to `digest`."""
        if isinstance(piece, Made):
            for chunk in piece.chunks():
                for start in range(0, len(chunk), BUFFER_BYTES):
                    self._emit(chunk[start : start + BUFFER_BYTES], None, write, digest)
            return
        source = self._source(piece.path)
        offset, left = piece.offset, piece.nbytes
        while left:
            buffer = self._free.get()
            count = os.preadv(source, [buffer[: min(left, BUFFER_BYTES)]], offset)
            if count == 0:
                self._free.put(buffer)
                raise CheckpointError(
                    f"{piece.path}: ended {left} bytes early; it changed while it was read",
                    "Let nothing write to the source, and run the same command again.",
                )
            offset, left = offset + count, left - count
            self._emit(buffer[:count], buffer, write, digest)

    def _emit(
        self,
        chunk: memoryview,
        buffer: memoryview | None,
        write: Callable[[memoryview], None] | None,
        digest: hashlib._Hash,
    ) -> None:
        self._work.put((digest, chunk, buffer))
        if write is not None:
            write(chunk)
        self.done += len(chunk)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def settle(self) -> None:
        """Wait until every chunk handed over so far is digested."""
        event = threading.Event()
        self._work.put(event)
        event.wait()

    def _source(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))  # the first that was opened
            descriptor = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._open[path] = descriptor
        return self._open[path]


def write_safetensors(
    path: Path, tensors: Sequence[PlannedTensor], stream: Stream, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write one safetensors file.

    Returns:
        Name → SHA-256 of the tensor's bytes.

    Raises:
        CheckpointError: a source ends early or the disk is full.
    """
    # Wide types first keeps every tensor aligned to its own size, whatever the shapes.
    tensors = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    digests = {tensor.name: hashlib.sha256() for tensor in tensors}
    header = build_header({t.name: (t.dtype, t.shape) for t in tensors}, dict(metadata or {}))
    try:
        with open(path, "wb", buffering=0) as file:
            write_all = write_to(file.fileno())
            write_all(memoryview(header))
            for tensor in tensors:
                for piece in tensor.pieces:
                    stream.copy(piece, write_all, digests[tensor.name])
            stream.settle()
    except OSError as error:
        raise disk_error(path, error) from error
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_to(descriptor: int) -> Callable[[memoryview], None]:
    """A function that writes all of what it is given to a file."""

    def write_all(data: memoryview) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write_all


def digest_pieces(pieces: Sequence[Extent | Made], stream: Stream) -> str:
    """SHA-256 of pieces, read and thrown away."""
    digest = hashlib.sha256()
    for piece in pieces:
        stream.copy(piece, None, digest)
    stream.settle()
    return digest.hexdigest()


def disk_error(path: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{path}: the disk is full", "Free some space, or name a folder on another disk.")
    hint = {
        errno.EMFILE: OPEN_MORE,
        errno.ENAMETOOLONG: "Choose a shorter name: a temporary one is made of it.",
    }.get(error.errno or 0, "Name a place that can be written.")
    return CheckpointError(f"{error.filename or path}: {error.strerror or error}", hint)


def plan_shards(tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Divide tensors, in their order, over files of at most `shard_bytes` (a single tensor may be larger)."""
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards

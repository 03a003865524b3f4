"""Moves tensors from files to files, a chunk at a time: memory does not grow with the model.

    pieces of a tensor ──read──▶ buffer ──write──▶ new file
                                   └──▶ SHA-256, in a second thread

A tensor is planned as the pieces of which it consists, in order: byte ranges of source files, or bytes that are
computed meanwhile. So stacking q, k and v is naming three ranges, and nothing is ever parsed into an array.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.tensors import DTYPE_BYTES, FileRange, GeneratedBytes, PlannedTensor

CHUNK_BYTES = 1 << 20
"""Fits the cache between reading, hashing and writing. Writes of 8 MB took four times as long on ext4."""
BUFFERS = 8
OPEN_FILES = 16
"""Sources that are kept open; a model may have hundreds of files, and a process 1024 of all kinds."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Stream:
    """Copies pieces and hashes them meanwhile. Use as a context manager.

    Args:
        total: bytes that will be copied in all, for `progress`.
    """

    def __init__(self, total: int, progress: Progress | None = None):
        self.done, self.total, self.progress = 0, total, progress
        self._buffers = itertools.cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(BUFFERS)])
        self._thread = ThreadPoolExecutor(1, "digest")
        self._hashing: deque[Future[None]] = deque()
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        while self._open:
            os.close(self._open.popitem()[1])

    def copy(
        self, piece: FileRange | GeneratedBytes, write: Callable[[memoryview], None] | None, digest: hashlib._Hash
    ) -> None:
        """Read a piece; hand every chunk to `write` (None: only hash it) and to `digest`."""
        for chunk in piece.chunks() if isinstance(piece, GeneratedBytes) else self._read(piece):
            self._hashing.append(self._thread.submit(digest.update, chunk))
            if write is not None:
                write(chunk)
            self.wait(BUFFERS - 1)  # so that the next buffer is free
            self.done += len(chunk)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def wait(self, pending: int = 0) -> None:
        """Wait until at most so many chunks are still to be hashed."""
        while len(self._hashing) > pending:
            self._hashing.popleft().result()

    def _read(self, piece: FileRange) -> Iterator[memoryview]:
        source = self._source(piece.path)
        offset, left = piece.offset, piece.nbytes
        while left:
            buffer = next(self._buffers)
            count = os.preadv(source, [buffer[: min(left, CHUNK_BYTES)]], offset)
            if count == 0:
                raise ended_early(piece.path, left)
            offset, left = offset + count, left - count
            yield buffer[:count]

    def _source(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))  # the first that was opened
            self._open[path] = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[path]


def read_chunks(piece: FileRange | GeneratedBytes) -> Iterator[memoryview]:
    """The bytes of a piece, each chunk in memory of its own and a whole number of elements."""
    if isinstance(piece, GeneratedBytes):
        yield from piece.chunks()
        return
    with open(piece.path, "rb") as file:
        file.seek(piece.offset)
        for start in range(0, piece.nbytes, CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, piece.nbytes - start)
            data = file.read(nbytes)
            if len(data) < nbytes:
                raise ended_early(piece.path, nbytes - len(data))
            yield memoryview(data)


def ended_early(path: Path, missing: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: ended {missing} bytes early; it changed while it was read",
        "make sure that no other program writes to the source, and run the same command again",
    )


def digest_pieces(pieces: Sequence[FileRange | GeneratedBytes], stream: Stream) -> str:
    """SHA-256 of pieces, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        stream.copy(piece, None, digest)
    stream.wait()
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: Sequence[PlannedTensor], stream: Stream, kind: str = "ms") -> dict[str, str]:
    """Write one safetensors file.

    Args:
        kind: "ms" or "pt", the program for which it is; transformers refuses a file that is not for torch.

    Returns:
        Name → SHA-256 of the tensor's bytes.

    Raises:
        CheckpointError: a source ends early or the disk is full.
    """
    # Wide types first keeps every tensor aligned to its own size, whatever the shapes.
    tensors = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    digests = {tensor.name: hashlib.sha256() for tensor in tensors}
    try:
        with open(path, "wb", buffering=0) as file:
            write_all = write_to(file.fileno())
            write_all(memoryview(_build_header(tensors, kind)))
            for tensor in tensors:
                for piece in tensor.pieces:
                    stream.copy(piece, write_all, digests[tensor.name])
            stream.wait()
    except OSError as error:
        raise disk_error(path, error) from error
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _build_header(tensors: Sequence[PlannedTensor], kind: str) -> bytes:
    """The first bytes of a safetensors file whose data follow in the order of `tensors`."""
    entries: dict[str, Any] = {"__metadata__": {"format": kind}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data are aligned
    return len(header).to_bytes(8, "little") + header


def write_to(descriptor: int) -> Callable[[memoryview], None]:
    """A function that writes all of what it gets to a file."""

    def write_all(data: memoryview) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write_all


def disk_error(path: Path, error: OSError) -> CheckpointError:
    """The error for a file or folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{path}: the disk is full", "free some space, or name a folder on another disk")
    return CheckpointError(f"{error.filename or path}: {error.strerror or error}", "choose a place where you may write")


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

"""Read zip and tar.gz archives as a stream of members, trusting nothing in them.

The standard library takes the formats apart; what is added here is what it lacks against hostile files: a tar header
that asks for gigabytes of memory, a zip whose directory is larger than memory, a gzip end that is never checked.
"""

from __future__ import annotations

import errno
import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from llavanext_cli.errors import DataError

FILE, FOLDER, LINK, HARD_LINK, OTHER = "file", "folder", "link", "hard link", "other"
LARGEST_READ = 4 << 20
"""Bytes that a tar header may ask for at once; names and attributes are far smaller."""
LARGEST_DIRECTORY = 256 << 20
"""Bytes of a zip's directory: two million files."""
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a zip compression that this Python does not know
    RuntimeError,  # an encrypted zip member
    struct.error,
    ValueError,
    OverflowError,
    UnicodeError,
)


@dataclass(frozen=True)
class ArchiveMember:
    """One entry. `target` is where a link points; `open` gives the bytes of a file, before the next member is read."""

    name: str
    kind: str
    size: int
    target: str
    open: Callable[[], IO[bytes]]


@contextmanager
def open_archive(
    path: Path, report: Callable[[int], None] = lambda done: None, name: str = ""
) -> Iterator[Iterator[ArchiveMember]]:
    """Open a zip, tar or tar.gz by its first bytes.

    Args:
        report: told how many bytes of the archive have been read; for a zip, of the members.
        name: what to call it in messages; its file name when empty.

    Raises:
        DataError: it is no archive, or a broken one; here or while reading.
    """
    name = name or path.name
    try:
        with open(path, "rb", buffering=0) as file:
            magic = file.read(262 + 6)
            file.seek(0)
            if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                with _open_zip(file, name) as archive:
                    yield zip_members(archive, report)
            elif magic[:2] == b"\x1f\x8b":
                counted = _Counted(file, report)
                with gzip.GzipFile(fileobj=io.BufferedReader(counted, 1 << 20)) as unpacked:
                    yield _tar_members(unpacked)
            elif magic[257:262] == b"ustar":
                yield _tar_members(io.BufferedReader(_Counted(file, report), 1 << 20))
            else:
                raise DataError(f"{name} is neither a zip nor a tar archive", _AGAIN)
    except DataError:
        raise
    except _BROKEN as fault:
        raise DataError(f"{name} is a broken archive: {_first_line(fault)}", _AGAIN) from fault


_AGAIN = "Run the same command again, or use another source."


def zip_members(archive: zipfile.ZipFile, report: Callable[[int], None] = lambda done: None) -> Iterator[ArchiveMember]:
    """The members of an open zip, in the order of its directory."""
    done = 0
    for entry in archive.infolist():
        mode = entry.external_attr >> 16 if entry.create_system == 3 else 0
        kind = FOLDER if entry.is_dir() else FILE
        target = ""
        if stat.S_IFMT(mode) == stat.S_IFLNK:
            kind = LINK
            if entry.file_size > 4096:
                raise zipfile.BadZipFile("a link with an endless target")
            target = archive.read(entry).decode("utf-8")
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = OTHER
        yield ArchiveMember(entry.orig_filename, kind, entry.file_size, target, partial(_open_member, archive, entry))
        done += entry.compress_size
        report(done)


def _open_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return archive.open(entry)
    except OSError as fault:
        if fault.errno == errno.EINVAL:  # an offset before the file's start
            raise zipfile.BadZipFile("its directory points outside of it") from fault
        raise


def _open_zip(file: IO[bytes], name: str) -> zipfile.ZipFile:
    """Refuses a directory that would not fit in memory before it is read."""
    size = file.seek(0, io.SEEK_END)
    tail_start = max(0, size - 22 - 65535)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise zipfile.BadZipFile("it has no directory; was it cut off?")
    length = struct.unpack("<I", tail[at + 12 : at + 16])[0]
    locator = tail[at - 20 : at] if at >= 20 else b""
    if length == 0xFFFFFFFF and locator[:4] == b"PK\x06\x07":  # zip64: the true length is in another record
        file.seek(min(size, struct.unpack("<Q", locator[8:16])[0]))
        record = file.read(56)
        length = struct.unpack("<Q", record[40:48])[0] if len(record) == 56 else length
    if length > min(size, LARGEST_DIRECTORY):
        raise DataError(f"{name} claims a directory of {length} bytes", "It is not an archive to unpack.")
    file.seek(0)
    return zipfile.ZipFile(file)


def _tar_members(stream: IO[bytes]) -> Iterator[ArchiveMember]:
    with tarfile.TarFile(fileobj=_Forward(stream), mode="r") as tar:
        tar.errorlevel = 2
        while (entry := tar.next()) is not None:
            tar.members = []  # it would keep every header in memory
            if entry.isreg() and not entry.issparse():
                kind = FILE
            elif entry.isdir():
                kind = FOLDER
            elif entry.issym():
                kind = LINK
            elif entry.islnk():
                kind = HARD_LINK
            else:
                kind = OTHER
            if entry.size < 0:
                raise tarfile.ReadError("a member of negative size")
            yield ArchiveMember(entry.name, kind, entry.size, entry.linkname, lambda e=entry: tar.extractfile(e))
    while block := stream.read(1 << 20):  # gzip checks its sum at the very end, which tar does not read
        if block.strip(b"\0"):
            raise tarfile.ReadError("bytes follow the end of the archive")


class _Counted(io.RawIOBase):
    """Reports how far a file has been read."""

    def __init__(self, file: IO[bytes], report: Callable[[int], None]):
        self._file, self._report, self._done = file, report, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self._done += count
        self._report(self._done)
        return count


class _Forward:
    """A stream with the part of a file's interface that tarfile uses: `seek` goes forward only."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._position = stream, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_READ:
            raise tarfile.ReadError("a header asks for too much memory")
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < self._position:
            raise tarfile.ReadError("a header points backwards")
        while self._position < position:
            block = self._stream.read(min(1 << 20, position - self._position))
            if not block:
                raise tarfile.ReadError("it ends too early")
            self._position += len(block)
        return position

    def close(self) -> None:
        pass


def _first_line(fault: BaseException) -> str:
    return (str(fault).splitlines() or [""])[0][:200] or type(fault).__name__

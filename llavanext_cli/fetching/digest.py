"""What a file must be, and whether it is: size, sha256, or the name that git gives its bytes.

The Hub names large files by their sha256 and small ones by git's blob id, sha1("blob SIZE\\0" + bytes). The manifest
records sha256 for both.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.fetching.net import StoppedError

BLOCK = 1 << 20


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; empty fields are not known."""

    size: int | None = None
    sha256: str = ""
    git_blob: str = ""

    @property
    def version(self) -> str:
        return self.sha256 or self.git_blob

    def fault(self, found: Digests) -> str:
        """In a few words how the file differs from what is expected; "" when it does not."""
        if self.size is not None and found.size != self.size:
            return f"{found.size} bytes instead of {self.size}"
        if self.sha256 and found.sha256 != self.sha256.lower():
            return f"sha256 {found.sha256[:12]}… instead of {self.sha256[:12]}…"
        if self.git_blob and found.git_blob != self.git_blob.lower():
            return f"git blob {found.git_blob[:12]}… instead of {self.git_blob[:12]}…"
        return ""


@dataclass(frozen=True)
class Digests:
    """What a file is."""

    size: int
    sha256: str
    git_blob: str


def hash_file(
    path: Path,
    *,
    want_git: bool = False,
    report: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
) -> Digests:
    """Read a file once and compute its digests (`git_blob` is "" unless wanted).

    Raises:
        OSError: it cannot be read.
        StoppedError: `stop` was set.
    """
    follower = Follower(want_git=want_git)
    return follower.finish(path, report=report, stop=stop)


class Follower:
    """Hashes a file while it is being written, as far as it is there without a hole.

    `follow` starts a thread; `finish` waits for it and hashes what is left. With two cores the digest of a large file
    is ready almost as soon as its last byte.
    """

    def __init__(self, want_git: bool = False):
        self._sha256 = hashlib.sha256()
        self._want_git = want_git
        self._position = 0
        self._limit = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._broken = False

    @property
    def position(self) -> int:
        """Bytes hashed so far; 0 when they have to be hashed again."""
        return 0 if self._broken else self._position

    def follow(self, open_file: Callable[[], int]) -> None:
        """Start hashing; `open_file` returns a descriptor to read from, and is called once there is something."""
        self._thread = threading.Thread(target=self._run, args=(open_file,), name="digest", daemon=True)
        self._thread.start()

    def advance(self, limit: int) -> None:
        """Bytes 0..limit-1 are written. A limit below an earlier one means that the file was begun anew."""
        with self._changed:
            if limit < self._limit:
                self._broken = True
            self._limit = limit
            self._changed.notify()

    def abandon(self) -> None:
        """Stop the thread; nothing will be finished."""
        with self._changed:
            self._ended = self._broken = True
            self._changed.notify()

    def finish(
        self,
        path: Path,
        report: Callable[[int], None] = lambda done: None,
        stop: threading.Event | None = None,
    ) -> Digests:
        """Hash what is left of the finished file, and say what it is."""
        if self._thread is not None:
            with self._changed:
                self._ended = True
                self._changed.notify()
            self._thread.join()
        if self._broken:
            self._sha256, self._position = hashlib.sha256(), 0
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if self._want_git else None
            if git is not None:
                self._sha256, self._position = hashlib.sha256(), 0  # small files only: reading them twice costs nothing
            file.seek(self._position)
            buffer = bytearray(BLOCK)
            view = memoryview(buffer)
            while count := file.readinto(buffer):
                if stop is not None and stop.is_set():
                    raise StoppedError
                self._sha256.update(view[:count])
                if git is not None:
                    git.update(view[:count])
                self._position += count
                report(self._position)
        return Digests(self._position, self._sha256.hexdigest(), git.hexdigest() if git is not None else "")

    def _run(self, open_file: Callable[[], int]) -> None:
        descriptor = -1
        try:
            while True:
                with self._changed:
                    while not (self._ended or self._broken or self._limit >= self._position + BLOCK):
                        self._changed.wait()
                    if self._ended or self._broken:
                        return
                    limit = self._limit
                if descriptor < 0:
                    descriptor = open_file()
                while self._position < limit and not (self._ended or self._broken):
                    data = os.pread(descriptor, min(BLOCK, limit - self._position), self._position)
                    if not data:  # still in the writer's buffer
                        time.sleep(0.02)
                        break
                    self._sha256.update(data)
                    self._position += len(data)
        except OSError:
            self._broken = True  # finish() reads the whole file, and raises if that fails too
        finally:
            if descriptor >= 0:
                os.close(descriptor)

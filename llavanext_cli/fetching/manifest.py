"""What `fetch` put into a folder, written beside it, and the state of each file: missing, present or verified.

    DIR/.llavanext/manifest.json     artifacts; files, with origin, digests and, for an archive, its members
    DIR/.llavanext/download/         what is on its way

A manifest may come from somebody else, with the folder, so its types and paths are checked like any other input.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.fetching.registry import Unpacking, public_address
from llavanext_cli.fetching.remote import STATE, Digests, Origin, RemoteFile, check_name
from llavanext_cli.files import write_whole

SAVE_SECONDS = 2.0


class State(Enum):
    """Of a file in the folder: absent; there; there, and the same as when its digest was compared."""

    MISSING = "missing"
    PRESENT = "present"
    VERIFIED = "verified"


class Member(NamedTuple):
    """One file of an archive; `path` is relative to the user's folder."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class FileRecord:
    """A file that was fetched.

    Attributes:
        mtime_ns: what the disk said then, so that the file need not be read again. 0 for an archive that was deleted.
        unpacking, members: of an archive that was unpacked.
    """

    origin: Origin
    size: int
    sha256: str
    git_blob: str = ""
    mtime_ns: int = 0
    unpacking: Unpacking | None = None
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class ArtifactRecord:
    """An artifact: its files that were wanted, and how many it offers."""

    source: str
    where: str
    requested: str
    revision: str
    paths: tuple[str, ...]
    offered: int


@dataclass
class _Content:
    llavanext_fetch: Literal[2]
    artifacts: dict[str, ArtifactRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


class Manifest:
    """The manifest of one folder. `record` may be called from several threads."""

    def __init__(self, root: Path):
        """Read it; without one, the manifest is empty.

        Raises:
            DataError: it cannot be read, or names a path outside the folder.
        """
        self.root, self.path = root, root / STATE / "manifest.json"
        content = self._read() if self.path.exists() else _Content(2)
        self.artifacts, self.files = content.artifacts, content.files
        self._lock = threading.Lock()
        self._saved = 0.0

    def _read(self) -> _Content:
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_Content)
        except (msgspec.MsgspecError, RecursionError) as fault:
            raise DataError(
                f"{self.path} was not written by this version of fetch: {fault}",
                f"delete {self.path} and fetch again: complete files are recognised and not downloaded again",
            ) from fault
        for path, record in content.files.items():
            into = (record.unpacking.into,) if record.unpacking and record.unpacking.into else ()
            for name in (path, *into, *(member.path for member in record.members)):
                check_name(name, str(self.path))
        return content

    def save(self) -> None:
        with self._lock:
            self._save()

    def _save(self) -> None:
        data = msgspec.json.encode(_Content(2, self.artifacts, self.files))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, msgspec.json.format(data, indent=1) + b"\n")
        self._saved = time.monotonic()

    def record(self, file: RemoteFile, digests: Digests, members: Iterable[Member] = ()) -> None:
        """Write down that a file is verified.

        A file that is not written down yet when the process is killed is recognised by its digest, so the manifest is
        not written for every one of thousands.
        """
        path = self.root / file.path
        mtime_ns = path.stat().st_mtime_ns if path.is_file() else 0
        origin = replace(file.origin, url=public_address(file.origin.url))
        record = FileRecord(
            origin, digests.size, digests.sha256, digests.git_blob, mtime_ns, file.unpacking, tuple(members)
        )
        with self._lock:
            self.files[file.path] = record
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._save()

    def state_of(self, file: RemoteFile) -> State:
        """The state of a wanted file, by sizes and times: nothing is read."""
        record = self.files.get(file.path)
        if record is not None and _is_version(record, file):
            if record.members and not any(self.size_of(member.path) != member.size for member in record.members):
                return State.VERIFIED
            if not record.members and self.is_untouched(file.path):
                return State.VERIFIED
        return State.PRESENT if os.path.lexists(self.root / file.path) else State.MISSING

    def is_untouched(self, path: str) -> bool:
        """Whether a file has the size and the time that were recorded."""
        record = self.files.get(path)
        try:
            stat = (self.root / path).stat()
        except OSError:
            return False
        return record is not None and (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns)

    def size_of(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except OSError:
            return -1

    def is_complete(self, artifact: str) -> bool:
        return all(path in self.files for path in self.artifacts[artifact].paths)

    def wanted(self, paths: Iterable[str]) -> list[RemoteFile]:
        """Recorded files, as they must be."""
        return [
            RemoteFile(path, record.origin, record.size, record.sha256, record.git_blob, record.unpacking)
            for path, record in ((path, self.files[path]) for path in paths)
        ]


def _is_version(record: FileRecord, file: RemoteFile) -> bool:
    """Whether a record is of the version of the file that is wanted."""
    if file.sha256:
        return record.sha256 == file.sha256
    if file.git_blob:
        return record.git_blob == file.git_blob
    return is_same_file(record.origin, file.origin) and file.size in (None, record.size)


def is_same_file(one: Origin, other: Origin) -> bool:
    """Whether two origins name the same file, at whatever revision."""
    names = [(origin.source, origin.repo, origin.path, public_address(origin.url)) for origin in (one, other)]
    return names[0] == names[1]

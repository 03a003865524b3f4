"""One file of a source: where it comes from, what it must be, and where it goes in the user's folder.

The Hub names large files by their sha256 and small ones by git's blob id, sha1("blob SIZE\\0" + bytes). The manifest
records both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llavanext_cli.errors import DataError
from llavanext_cli.fetching.registry import Unpacking

STATE = ".llavanext"
"""Our own folder inside the user's: the manifest, the partial files."""
BLOCK = 1 << 20


class StoppedError(Exception):
    """Another download failed, or the user pressed Ctrl-C: this one ends early and keeps what has arrived."""


@dataclass(frozen=True)
class Origin:
    """Where a file comes from; with the server that the user chose, enough to fetch it again.

    Attributes:
        source: HUB, MODELSCOPE or URL.
        revision: commit, tag or branch of a repository.
        path: the file's path in its repository.
        url: the address of a plain file. The manifest gets it without its query and password.
    """

    source: str
    repo: str = ""
    kind: str = ""
    revision: str = ""
    path: str = ""
    url: str = ""


@dataclass(frozen=True)
class Digests:
    """What a file is. `git_blob` is empty when it was not computed."""

    size: int
    sha256: str
    git_blob: str = ""


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    Attributes:
        path: where it goes, relative to the user's folder.
        size, sha256, git_blob: what it must be; None and "" are unknown.
        unpacking: set for an archive that is unpacked.
    """

    path: str
    origin: Origin
    size: int | None = None
    sha256: str = ""
    git_blob: str = ""
    unpacking: Unpacking | None = None

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_blob

    def mismatch(self, found: Digests) -> str:
        """How the file differs from what is expected, in a few words; "" when it does not."""
        if self.size is not None and found.size != self.size:
            return f"{found.size} bytes instead of {self.size}"
        if self.sha256 and found.sha256 != self.sha256:
            return f"sha256 {found.sha256[:12]}… instead of {self.sha256[:12]}…"
        if self.git_blob and found.git_blob != self.git_blob:
            return f"git blob {found.git_blob[:12]}… instead of {self.git_blob[:12]}…"
        return ""


@dataclass(frozen=True)
class Listing:
    """What a source offers of an artifact: the files' paths are relative to the artifact's folder there."""

    source: str
    where: str
    requested: str
    revision: str
    files: tuple[RemoteFile, ...]


def hash_file(path: Path, git: bool = True, report: Callable[[int], None] = lambda count: None) -> Digests:
    """Read a file once and compute its digests.

    Args:
        git: compute `git_blob` too.
        report: called with the number of bytes of each block.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else None
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            if sha1 is not None:
                sha1.update(buffer[:count])
            report(count)
    return Digests(size, sha256.hexdigest(), sha1.hexdigest() if sha1 is not None else "")


def check_name(name: str, where: str) -> str:
    """The relative path `name` in its normal form; it comes from a server, an archive or a manifest (`where`).

    Raises:
        DataError: it must not be written, because it leaves the folder or is not portable.
    """
    reason = ""
    path = PurePosixPath(name)
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name) or "\\" in name:
        reason = "it has control characters or backslashes"
    elif path.is_absolute():
        reason = "it is absolute"
    elif ".." in path.parts:
        reason = "it leaves the folder"
    elif path.parts[:1] in ((STATE,), (".cache",)):
        reason = "the name is reserved"
    if reason:
        raise DataError(
            f"{where}: the file name {name[:200]!r} is not safe: {reason}",
            "check the name and the source; nothing was written to your folder",
        )
    return str(path)

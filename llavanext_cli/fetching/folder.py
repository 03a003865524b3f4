"""The user's folder while `fetch` works in it: the lock, the manifest, and where partial files are kept."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llavanext_cli.errors import ConfigError
from llavanext_cli.fetching.digest import Digests
from llavanext_cli.fetching.faults import explain_disk
from llavanext_cli.fetching.manifest import (
    ArchiveRecord,
    ArtifactRecord,
    FileRecord,
    Manifest,
    Member,
    read_members,
    write_members,
)
from llavanext_cli.fetching.paths import STATE
from llavanext_cli.fetching.redaction import cause_of
from llavanext_cli.fetching.registry import Unpacking
from llavanext_cli.fetching.remote import Origin

SAVE_SECONDS = 2.0
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Folder:
    """One folder and its manifest. Its methods may be called from several threads."""

    def __init__(self, root: Path):
        self.root = root
        self.state = root / STATE
        self.partial = self.state / "partial"
        self.unpacked = self.state / "unpacked"
        self.manifest = Manifest.load(root)
        self._lock = threading.Lock()
        self._saved, self._dirty = 0.0, False

    def path(self, name: str) -> Path:
        return self.root / name

    def stage(self, name: str, version: str) -> Path:
        """A folder for what is on its way to `name`; the same one for the same version of it."""
        return self._stages(name) / _short(version)

    def clear(self, name: str) -> None:
        """Remove what was on its way to `name`, other versions included."""
        shutil.rmtree(self._stages(name), ignore_errors=True)

    def bytes_on_their_way(self, name: str, version: str | None = None) -> int:
        """What an earlier run brought of this version of a file, or of all and unpacked, as the disk counts it."""
        found = (self._stages(name) if version is None else self.stage(name, version)).rglob("*")
        return sum(path.stat().st_blocks * 512 for path in found if path.is_file())

    def _stages(self, name: str) -> Path:
        return self.partial / _short(name)

    def record_file(self, name: str, digests: Digests, origin: Origin) -> None:
        stat = self.path(name).stat()
        with self._lock:
            self.manifest.files[name] = FileRecord(digests.size, digests.sha256, stat.st_mtime_ns, origin)
            self._dirty = True
            # A file that is not recorded yet when the process dies is recognised by its digest, so not every one of
            # thousands is worth a write.
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._save()

    def record_archive(
        self, name: str, digests: Digests, origin: Origin, rule: Unpacking, members: list[Member]
    ) -> None:
        with self._lock:
            self.manifest.archives[name] = ArchiveRecord(
                digests.size,
                digests.sha256,
                origin,
                rule.into,
                rule.tops,
                listing_name(name),
                len(members),
                sum(member.size for member in members),
            )
            self._save()

    def record_artifact(self, name: str, record: ArtifactRecord) -> None:
        with self._lock:
            self.manifest.artifacts[name] = record
            self._save()

    def save(self) -> None:
        """Write the manifest now, if it changed."""
        with self._lock:
            if self._dirty:
                self._save()

    def _save(self) -> None:
        self.manifest.save(self.root)
        self._saved, self._dirty = time.monotonic(), False

    def write_members(self, archive: str, members: list[Member]) -> None:
        write_members(self.unpacked / listing_name(archive), members)

    def members(self, archive: str) -> Iterator[Member]:
        """What an archive left in the folder. Raises `DataError` when its list is missing, broken or too short."""
        record = self.manifest.archives[archive]
        return read_members(self.unpacked / record.listing, record.members)

    def as_recorded(self, name: str) -> bool:
        """Whether a file looks as it did when it was recorded, by size and time; it is not read."""
        record = self.manifest.files.get(name)
        if record is None:
            return False
        try:
            stat = self.path(name).stat()
        except OSError:
            return False
        return stat.st_size == record.size and stat.st_mtime_ns == record.mtime_ns

    def damaged_members(self, archive: str) -> list[str]:
        """Members that are missing or of another size; they are not read."""
        return [member.path for member in self.members(archive) if not self.looks_whole(member)]

    def looks_whole(self, member: Member) -> bool:
        """Whether a member is there: a link to the right place, or a file of the right size."""
        path = self.path(member.path)
        try:
            return os.readlink(path) == member.link if member.link else path.stat().st_size == member.size
        except OSError:
            return False

    def tidy(self) -> None:
        """Remove the partial folder when nothing in it is worth keeping."""
        for stage in self.partial.iterdir() if self.partial.is_dir() else ():
            if stage.is_dir() and not any(path.is_file() for path in stage.rglob("*")):
                shutil.rmtree(stage, ignore_errors=True)
        for folder in (self.partial, self.unpacked):
            try:
                folder.rmdir()
            except OSError:
                continue


def listing_name(archive: str) -> str:
    """The file in `unpacked/` for an archive: its own name, and a few digits that tell equal names apart."""
    return f"{Path(archive).name}-{_short(archive)}.jsonl"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def locked_folder(root: Path, note: Callable[[str], None] = lambda line: None, create: bool = True) -> Iterator[Folder]:
    """Open a folder for one process alone; another one waits until this one is done.

    A folder that cannot be written is opened without a lock when it has a manifest: reading it harms nobody. One that
    was made here goes again in the end if nothing has arrived in it.

    Args:
        create: make the folder when it does not exist.

    Raises:
        ConfigError: there is no such folder, or it is a file.
        FetchError: it cannot be written.
        DataError: its manifest is broken.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file, not a folder", "Choose another --to.")
    if not create and not root.is_dir():
        raise ConfigError(f"there is no folder {root}", "Fetch into it first: llavanext fetch NAME --to FOLDER.")
    lock = None
    made = [path for path in (root / STATE, root, *root.parents) if not path.exists()]
    try:
        (root / STATE).mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(root / STATE / "lock")
            lock.acquire(timeout=0)
        except NotImplementedError:  # a file system without locks
            lock = SoftFileLock(root / STATE / "lock")
            lock.acquire(timeout=0)
    except Timeout:
        note(f"another fetch is working in {root}; waiting for it")
        while True:
            (root / STATE).mkdir(parents=True, exist_ok=True)  # the other one may have taken away what it made
            try:
                lock.acquire(timeout=0.5)
                break
            except (Timeout, FileNotFoundError):
                continue
    except OSError as fault:
        lock = None
        if fault.errno not in _READ_ONLY or not os.access(root / STATE / "manifest.json", os.R_OK):
            raise explain_disk(fault, root) from cause_of(fault)
    with ExitStack() as stack:
        if lock is not None:
            stack.callback(lock.release)
        folder = Folder(root)
        stack.callback(_remove_unused, folder, made)
        yield folder


def _remove_unused(folder: Folder, made: Sequence[Path]) -> None:
    """Take away the folders that were `made` for this run, innermost first, if nothing has arrived in them."""
    if folder.manifest.files or folder.manifest.archives or folder.state not in made:
        return
    with suppress(OSError):  # a folder that somebody has put something into stays, and so do those around it
        ours = list(folder.state.iterdir())
        if {path.name for path in ours} <= {"lock", "manifest.json"}:
            for path in ours:
                path.unlink()
            for path in made:
                path.rmdir()

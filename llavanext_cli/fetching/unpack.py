"""Unpack a zip or tar archive into a staging folder of ours; only a complete tree moves to the user's folder.

    archive ──▶ stage/train2017/…  ──rename──▶  DIR/coco/train2017/…

`tarfile.data_filter` (PEP 706) checks tar members; `check_name` and the resolved path check those of both formats. The
library's own `extract` is not used, so that the bytes are counted and hashed while they are written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from llavanext_cli.errors import DataError, RuntimeMissingError
from llavanext_cli.fetching.manifest import Member
from llavanext_cli.fetching.remote import BLOCK, StoppedError, check_name
from llavanext_cli.files import replacing

RATIO = 20
"""Bytes unpacked for a byte of archive: images and videos hardly shrink, a bomb grows a thousandfold."""
LEAST_CAP = 64 << 20
HINT = "Nothing of it was put into your folder. Is it the archive that you meant, from where you meant?"
BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError),  # a compression unknown to zipfile, an encrypted member
)


class _Entry(NamedTuple):
    """One file or folder of an archive; `open` is None for a folder."""

    name: str
    open: Callable[[], IO[bytes]] | None


def unpack_archive(
    archive: Path,
    stage: Path,
    *,
    name: str,
    tops: Collection[str] = (),
    report: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
) -> list[Member]:
    """Unpack into `stage`, an empty folder.

    Args:
        name: what messages call the archive.
        tops: names allowed at the top; empty allows all.
        report: called with the bytes unpacked so far.

    Returns:
        The files, their paths relative to `stage`.

    Raises:
        DataError: the archive is broken, or has a member that is not safe to write.
        OSError: `stage` cannot be written.
        StoppedError: `stop` was set.
    """
    cap = max(LEAST_CAP, RATIO * archive.stat().st_size)
    root = stage.resolve()
    members: list[Member] = []
    written = 0
    for entry in _entries(archive, root, name):
        path = check_name(entry.name, name)
        target = root / path
        if not target.resolve().is_relative_to(root):
            raise DataError(f"{name}: {path!r} is outside the folder", HINT)
        if tops and (path.partition("/")[0] not in tops or (entry.open and "/" not in path)):
            raise DataError(f"{name}: {path!r} is at the top, where only {', '.join(tops)}/ is expected", HINT)
        try:
            (target.parent if entry.open else target).mkdir(parents=True, exist_ok=True)
            if entry.open is None:
                continue
            output = target.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise DataError(f"{name}: {path!r} is in the archive twice", HINT) from None
        digest, size = hashlib.sha256(), 0
        with output:
            for block in _blocks(entry, name):
                if stop is not None and stop.is_set():
                    raise StoppedError
                size += len(block)
                written += len(block)
                if written > cap:
                    raise DataError(f"{name} grows to more than {cap} bytes at {path!r}", HINT)
                digest.update(block)
                output.write(block)
                report(written)
        members.append(Member(path, size, digest.hexdigest()))
    return members


def _blocks(entry: _Entry, name: str) -> Iterator[bytes]:
    try:
        with entry.open() as source:
            while block := source.read(BLOCK):
                yield block
    except BROKEN as fault:
        raise _broken(name, fault) from fault


def _entries(archive: Path, root: Path, name: str) -> Iterator[_Entry]:
    try:
        if zipfile.is_zipfile(archive):
            yield from _zip_entries(archive, name)
        else:
            yield from _tar_entries(archive, root, name)
    except (DataError, StoppedError):
        raise
    except BROKEN as fault:
        if isinstance(fault, OSError) and fault.errno is not None:
            raise
        raise _broken(name, fault) from fault


def _zip_entries(archive: Path, name: str) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == 3 else 0
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(name, entry.filename)
            yield _Entry(entry.orig_filename, None if entry.is_dir() else lambda e=entry: file.open(e))


def _tar_entries(archive: Path, root: Path, name: str) -> Iterator[_Entry]:
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeMissingError(
            "this Python cannot unpack archives safely (PEP 706)", "Use 3.10.12, 3.11.4 or later."
        )
    with tarfile.open(archive) as file:
        for entry in file:
            if entry.isdir() and entry.name in (".", "./"):
                continue
            check_name(entry.name.removeprefix("./"), name)  # before the filter, which makes absolute names relative
            try:
                tarfile.data_filter(entry, str(root))
            except tarfile.FilterError as fault:
                raise DataError(f"{name}: {fault}", HINT) from fault
            if not (entry.isreg() or entry.isdir()):
                raise _not_a_file(name, entry.name)
            yield _Entry(entry.name.removeprefix("./"), None if entry.isdir() else lambda e=entry: file.extractfile(e))


def _not_a_file(archive: str, name: str) -> DataError:
    return DataError(f"{archive}: {name!r} is not a regular file or folder (a link or a device)", HINT)


def _broken(name: str, fault: BaseException) -> DataError:
    reason = (str(fault).splitlines() or [""])[0][:200] or type(fault).__name__
    return DataError(f"{name} is not a complete zip or tar archive: {reason}", "Run the same command again.")


def move_file(source: Path, target: Path) -> None:
    """Rename, or copy where the target is on another disk, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as fault:
        if fault.errno != errno.EXDEV:
            raise
        with replacing(target) as partial:
            shutil.copy2(source, partial)
        source.unlink()

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
from functools import partial
from pathlib import Path
from typing import IO

from llavanext_cli.errors import DataError, RuntimeMissingError
from llavanext_cli.fetching.manifest import Member
from llavanext_cli.fetching.remote import BLOCK, StoppedError, check_name
from llavanext_cli.files import replacing

RATIO = 20
"""Bytes unpacked for a byte of archive: images and videos hardly shrink, a bomb grows a thousandfold."""
LEAST_CAP = 64 << 20
HINT = "check the name and the source; no file of this archive was put into your folder"
BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError),  # a compression unknown to zipfile, an encrypted member
)


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
    try:
        for member, open_member in (_zip_files if zipfile.is_zipfile(archive) else _tar_files)(archive, root, name):
            path = check_name(member, name)
            target = root / path
            if not target.resolve().is_relative_to(root):
                raise DataError(f"{name}: {path!r} is outside the folder", HINT)
            if tops and (path.partition("/")[0] not in tops or "/" not in path):
                raise DataError(f"{name}: {path!r} is at the top, where only {', '.join(tops)}/ is expected", HINT)
            digest, size = hashlib.sha256(), 0
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as source, target.open("xb") as output:
                while block := source.read(BLOCK):
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
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{name}: {path!r} is in the archive twice", HINT) from None
    except BROKEN as fault:
        if isinstance(fault, OSError) and fault.errno is not None:  # of the disk
            raise
        reason = (str(fault).splitlines() or [""])[0][:200] or type(fault).__name__
        hint = "Run the same command again."
        raise DataError(f"{name} is not a complete zip or tar archive: {reason}", hint) from fault
    return members


Files = Iterator[tuple[str, Callable[[], IO[bytes]]]]
"""The name of each file in an archive, and how to open it before the next one is asked for."""


def _zip_files(archive: Path, root: Path, name: str) -> Files:
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == 3 else 0
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(name, entry.filename)
            if not entry.is_dir():
                yield entry.orig_filename, partial(file.open, entry)


def _tar_files(archive: Path, root: Path, name: str) -> Files:
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeMissingError(
            "this Python cannot unpack tar safely (PEP 706)", "use Python 3.10.12, 3.11.4 or later"
        )
    with tarfile.open(archive) as file:
        for entry in file:
            check_name(entry.name, name)  # before the filter, which makes absolute names relative
            try:
                tarfile.data_filter(entry, str(root))
            except tarfile.FilterError as fault:
                raise DataError(f"{name}: {fault}", HINT) from fault
            if not (entry.isreg() or entry.isdir()):
                raise _not_a_file(name, entry.name)
            if entry.isreg():
                yield entry.name, partial(file.extractfile, entry)


def _not_a_file(archive: str, name: str) -> DataError:
    return DataError(f"{archive}: {name!r} is not a regular file or folder (a link or a device)", HINT)


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

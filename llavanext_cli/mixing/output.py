"""A file that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
from pathlib import Path
from typing import BinaryIO

from llavanext_cli.errors import DataError

JSON = (b"{", b"[")
"""First bytes of the samples, in both formats, and of the rejects."""
PAGE = (b"<!doctype html", b"<html")
"""First bytes of the report, in lower case."""


def check_output_file(path: Path, force: bool, begins: tuple[bytes, ...]) -> None:
    """Refuse early what could only fail late, and what would cost the user a file.

    Args:
        begins: `JSON` or `PAGE`. A file that is there and begins otherwise is not a mix's, but perhaps one of its
            pictures, and stays whether `force` is given or not.

    Raises:
        DataError: the folder does not exist or is not writable, or `path` is a folder, a device or another's file, or
            it exists and `force` is not given.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist", f"make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise DataError(f"{path} is a folder", "name a file in it")
    # renaming a file over /dev/null would take it from the whole machine; /dev/stdout may lead to a file
    if path.exists() and (not path.is_file() or path.parent == Path("/dev")):
        raise DataError(f"{path} is a device or a pipe, not a file", "name a file; --dry-run writes none")
    if path.exists() and not _begins(path, begins):
        raise DataError(f"{path} exists, and llavanext mix has not written it", "name another file for the output")
    if path.exists() and not force:
        raise DataError(f"{path} exists", "name another file, or give --force to replace it")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: no permission to write in {path.parent}", "choose another folder for the output")


def _begins(path: Path, begins: tuple[bytes, ...]) -> bool:
    """Whether a file begins so, or is empty. One that cannot be read does not."""
    try:
        with path.open("rb") as file:
            head = file.read(16).lower()
    except OSError:
        return False
    return not head or head.startswith(begins)


class OutputFile:
    """Writes to a temporary name beside `path`; `commit` renames it. Left without a commit, nothing remains.

    With `path` None everything is a no-op: the dry run. With `force` False a file that has appeared at `path` meanwhile
    is not replaced.
    """

    def __init__(self, path: Path | None, force: bool = False):
        self.path, self.force = path, force
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part") if path else None
        self._file: BinaryIO | None = None

    def __enter__(self) -> OutputFile:
        if self._temporary:
            _remove_abandoned(self.path)
            try:
                self._file = self._temporary.open("wb", buffering=1 << 20)
            except OSError as error:
                raise self._error(error) from error
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def write(self, data: bytes) -> None:
        """Raises:
        DataError: the disk is full, or the file cannot be written for another reason.
        """
        if self._file:
            try:
                self._file.write(data)
            except OSError as error:
                raise self._error(error) from error

    def finish(self) -> None:
        """Bring what was written to the disk, so that `commit` no longer wants for room. Errors as in `write`."""
        if self._file:
            try:
                self._file.flush()
                os.close(os.dup(self._file.fileno()))  # a network drive tells that it is full when a file is closed
            except OSError as error:
                raise self._error(error) from error

    def commit(self) -> None:
        """Put the file in its place.

        Raises:
            DataError: as in `write`; or another file is there by now, and `force` is not given.
        """
        self.finish()
        if not self._file:
            return
        try:
            if self.force:
                os.replace(self._temporary, self.path)
            else:
                _rename_to_new(self._temporary, self.path)
        except FileExistsError as error:
            raise DataError(
                f"{self.path} exists: another command has made it meanwhile", "name another file, or give --force"
            ) from error
        except OSError as error:
            raise self._error(error) from error

    def __exit__(self, *_: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # a full disk complains again when the buffer is dropped
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> DataError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or choose another disk" if is_full else "choose another folder for the output"
        return DataError(f"{self.path} could not be written: {error.strerror}", hint)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename, unless `target` exists. Only linking tells at the same moment, and some disks know no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(source, target)
    else:
        source.unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose process was killed: nobody holds their lock."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not part.name.removeprefix(f".{path.name}.").removesuffix(".part").isdigit():
            continue
        with contextlib.suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()

"""A file that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from llavanext_cli.errors import DataError


def check_output_folder(path: Path, force: bool) -> None:
    """Refuse early what could only fail late.

    Raises:
        DataError: the folder does not exist or is not writable, or `path` is a folder or a device, or it exists and
            `force` is not given.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist", f"make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise DataError(f"{path} is a folder", "name a file in it")
    if path.exists() and not path.is_file():  # renaming a file over /dev/null would take it from the whole machine
        raise DataError(f"{path} is a device or a pipe, not a file", "name a file; --dry-run writes none")
    if path.exists() and not force:
        raise DataError(f"{path} exists", "name another file, or give --force to replace it")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: no permission to write in {path.parent}", "choose another folder for the output")


class OutputFile:
    """Writes to a temporary name beside `path`; `commit` renames it. Left without a commit, nothing remains.

    With `path` None everything is a no-op: the dry run.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part") if path else None
        self._file: BinaryIO | None = None

    def __enter__(self) -> OutputFile:
        if self._temporary:
            try:
                self._file = self._temporary.open("wb", buffering=1 << 20)
            except OSError as error:
                raise self._error(error) from error
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

    def commit(self) -> None:
        """Put the file in its place."""
        if not self._file:
            return
        try:
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._error(error) from error

    def __exit__(self, *_: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # a full disk complains again when the buffer is dropped
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path} could not be written: {error.strerror}", "free some space, or choose another disk"
        )

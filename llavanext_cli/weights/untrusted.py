"""Reading files that come from elsewhere: regular files only, and text that is safe to print."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llavanext_cli.errors import CheckpointError


def open_regular(path: str | Path) -> BinaryIO:
    """Open for reading. A pipe or a device, which has no end, is an OSError."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system refuses to open or read."""
    hint = "check that it is a file and that you may read it: ls -lL shows both"
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error})", hint)


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of sizes."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def short(value: Any) -> str:
    """A name or value out of a file, as one printable line of at most 120 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 120 else text[:117] + "..."

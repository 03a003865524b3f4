"""Files: written whole or not at all, told from what is none, and where this program keeps its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with the same ending. What is written there takes the place of `path` in the end;
    after an error it is removed, and `path` is as it was.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when it appears.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def other_than_file(path: Path) -> str:
    """What stands at a path that is no file, in words; empty where a file does, or nothing."""
    if path.is_dir():
        return "a folder"
    if path.exists():
        return "" if path.is_file() else "a device or a pipe"
    return "a link to nothing" if path.is_symlink() else ""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llavanext`, or `~/.cache/llavanext`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llavanext"

"""Paths that commands write: whether one may, who holds them meanwhile, and how a result appears whole or not at all.

check_target(path, ...)    before any work: may this command write there?
claim(path)                while it works: no second command writes there
replacing(path)            at the end: a file or folder takes its name when it is complete
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llavanext_cli.errors import LlavaNextError


def check_target(
    path: Path,
    *,
    kind: str,
    is_ours: Callable[[Path], bool],
    force: bool,
    folder: bool = False,
    option: str = "--out",
    inputs: Iterable[Path] = (),
) -> bool:
    """Check before any work that a command may write to `path`.

    Args:
        kind: what the command writes there, with its article, such as "a training run" or "a mix".
        is_ours: whether what exists at `path` is of that kind; only then may `force` replace it.
        folder: the command writes a folder and not a file. Parents of a folder are made, those of a file are not.
        option: what the user changes to choose another place.
        inputs: files and folders that the command reads, and that must survive it.

    Returns:
        Whether something is there that will be replaced.

    Raises:
        LlavaNextError: with the reason, and what to do.
    """
    other = f"choose another {option}"
    target = path.resolve()
    for source in (item.resolve() for item in inputs):
        if target == source or (folder and (target in source.parents or source in target.parents)):
            raise LlavaNextError(f"{path}: writing there would damage the input {source}", other)
    if path.is_symlink() and not path.exists():
        raise LlavaNextError(f"{path} is a broken link", other)
    if not folder and not path.parent.is_dir():
        raise LlavaNextError(f"{path}: the folder {path.parent} does not exist", f"mkdir -p {path.parent}")
    existing = next(place for place in (target, *target.parents) if place.exists())
    if existing != target and not existing.is_dir():
        raise LlavaNextError(f"{path}: {existing} is not a folder", other)
    if not os.access(target.parent if target.parent.exists() else existing, os.W_OK):
        raise LlavaNextError(f"{path}: no permission to write there", other)
    if existing != target:
        return False
    if folder != path.is_dir() or not (path.is_dir() or path.is_file()) or path.parent == Path("/dev"):
        raise LlavaNextError(f"{path} is {describe(path)}, not a {'folder' if folder else 'file'}", other)
    if folder and not any(path.iterdir()):
        return False
    if not is_ours(path):
        raise LlavaNextError(f"{path} exists and is not {kind}", other)
    if not force:
        raise LlavaNextError(f"{path} already holds {kind}", f"add --force to replace it, or {other}")
    return True


def describe(path: Path) -> str:
    """`a folder`, `a file`, `a device or a pipe`, `a broken link` or `missing`: what a path leads to."""
    if path.is_dir():
        return "a folder"
    if path.exists():
        return "a file" if path.is_file() and path.parent != Path("/dev") else "a device or a pipe"
    return "a broken link" if path.is_symlink() else "missing"


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold `path`, so that no second command writes there; what a killed command left beside it is removed.

    The lock is the file `.NAME.lock` beside `path`, and is removed at the end. Missing parents are made, and removed
    again if nothing was put into them.

    Raises:
        LlavaNextError: another command holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = path.resolve()
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        lock.acquire()
    except Timeout as fault:
        raise LlavaNextError(
            f"{path} is in use by another llavanext command", "wait until that has ended, or choose another place"
        ) from fault
    except OSError as fault:
        raise LlavaNextError(f"{path}: cannot be written: {fault.strerror}", "choose another place") from fault
    try:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial*"):
            _remove(leftover)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for parent in made:  # innermost first
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the block to write a file or to make a folder at.

    It takes the name `path` when the block ends well; what was there before stays until then. After an error, or
    Ctrl-C, it is removed and `path` is as it was.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()  # through a link: its target is replaced, and the link stays
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")  # same ending: Pillow reads it
    retired = path.with_name(f".{path.name}.{os.getpid()}.partial.old")
    try:
        yield partial
        if path.is_dir():
            os.rename(path, retired)
        try:
            os.replace(partial, path)
        except BaseException:
            if retired.exists():
                os.rename(retired, path)
            raise
    finally:
        _remove(partial)
        _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when it appears.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llavanext`, or `~/.cache/llavanext`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llavanext"

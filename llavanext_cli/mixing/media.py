"""Checks one picture or clip, as far as asked: that it is there, that its header is sound, that it decodes.

    exists    a readable file with something in it
    header    a picture opens and tells its size; a clip opens, has a video stream, frames and a duration
    full      a picture decodes; the frames of a clip that training would use decode, and its frame count is true

Decoders are loaded when they are first needed, so that the cheap levels stay cheap.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from llavanext_cli.errors import DataError

LEVELS = ("none", "exists", "header", "full")


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        reason: one word for counting, or "" when the file is good.
        detail: a sentence about what is wrong.
        size: (height, width) in pixels as displayed, when the header was read.
        frames: frames of a clip, as its header says or as counted; 0 for a picture.
        seconds: duration of a clip; 0 for a picture.
    """

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] | None = None
    frames: int = 0
    seconds: float = 0.0


class FileState(NamedTuple):
    """What identifies a file's content without reading it: length in bytes and time of change in nanoseconds."""

    size: int
    mtime_ns: int


def stat_file(path: str) -> FileState | Verdict:
    """Look whether `path` is a readable file with something in it; links are followed.

    Returns:
        Its state, or the verdict against it.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Verdict("not_a_file", f"{path} is no file")
        if found.st_size == 0:
            return Verdict("empty_file", f"{path} has 0 bytes")
        if not os.access(path, os.R_OK):
            return Verdict("unreadable", f"{path}: permission denied")
    except OSError as error:
        return _from_os_error(path, error)
    except ValueError as error:  # a NUL byte, or a lone surrogate that no file name can hold
        return Verdict("bad_path", f"{path!r}: {error}")
    return FileState(found.st_size, found.st_mtime_ns)


def _from_os_error(path: str, error: OSError) -> Verdict:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Verdict("missing", f"{path} does not exist")
    if error.errno == errno.ELOOP:
        return Verdict("link_loop", f"{path}: its symbolic links go in a circle")
    if error.errno == errno.ENAMETOOLONG:
        return Verdict("bad_path", f"{path[:80]}...: the name is too long")
    return Verdict("unreadable", f"{path}: {error.strerror or error}")


def check_file(kind: str, path: str, level: str, frames: int) -> Verdict:
    """Check one file at level "header" or "full"; `frames` is how many of a clip training would use."""
    state = stat_file(path)  # it may have gone since it was listed
    if isinstance(state, Verdict):
        return state
    try:
        if kind == "image":
            return check_picture(path, level)
        from llavanext_cli.mixing.clips import check_clip

        return check_clip(path, level, frames, state.size)
    except OSError as error:
        return _from_os_error(path, error)
    except MemoryError:
        return Verdict("crashed", f"{path}: there is not enough memory to decode it")


def check_picture(path: str, level: str) -> Verdict:
    """Read a picture's size, and decode it as training would when `level` is "full"."""
    from llavanext_cli.processing.image import TooLargeError, load_image, read_image_size

    try:
        size = read_image_size(path)
        if level == "full":
            load_image(path)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno):
            raise cause from None  # the machine's fault, not the picture's: PIL's own errors have no number
        return Verdict("too_large" if isinstance(error, TooLargeError) else "corrupt", error.what)
    return Verdict(size=size)

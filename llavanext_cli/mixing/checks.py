"""Checks one image or video file as far as asked.

    exists    a readable file with something in it
    header    an image opens and has a size; a video opens and has a video stream, frames and a duration
    full      an image decodes; the frames of a video that training would use decode, and its frame count is true

Decoders are imported when they are first needed, so that the first level stays fast.
"""

from __future__ import annotations

import errno
import os
import stat

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.check_result import CheckResult, FileState


def stat_file(path: str) -> FileState | CheckResult:
    """Whether `path` is a readable file with something in it; symbolic links are followed.

    Returns:
        Its state, or what is wrong.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return CheckResult("not_a_file", f"{path} is not a file")
        if found.st_size == 0:
            return CheckResult("empty_file", f"{path} has 0 bytes")
        if not os.access(path, os.R_OK):
            return CheckResult("unreadable", f"{path}: permission denied")
    except OSError as error:
        return _from_os_error(path, error)
    except ValueError as error:  # a NUL byte, or a lone surrogate that no file name can hold
        return CheckResult("bad_path", f"{path!r}: {error}")
    return FileState(found.st_size, found.st_mtime_ns)


def _from_os_error(path: str, error: OSError) -> CheckResult:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckResult("missing", f"{path} does not exist")
    if error.errno == errno.ELOOP:
        return CheckResult("link_loop", f"{path}: its symbolic links form a loop")
    if error.errno == errno.ENAMETOOLONG:
        return CheckResult("bad_path", f"{path[:80]}...: the name is too long")
    return CheckResult("unreadable", f"{path}: {error.strerror or error}")


def check_file(kind: str, path: str, level: str, frames: int) -> CheckResult:
    """Check one file at level "header" or "full"; `frames` is how many frames of a video training would use."""
    state = stat_file(path)  # it may have been removed since it was listed
    if isinstance(state, CheckResult):
        return state
    try:
        if kind == "image":
            return check_image(path, level)
        from llavanext_cli.mixing.video_check import check_video

        return check_video(path, level, frames, state.size)
    except OSError as error:
        return _from_os_error(path, error)
    except MemoryError:
        return CheckResult("crashed", f"{path}: there is not enough memory to decode it")


def check_image(path: str, level: str) -> CheckResult:
    """Read an image's size, and decode it as training would when `level` is "full"."""
    from llavanext_cli.processing.image import TooLargeError, load_image, read_image_size

    try:
        size = read_image_size(path)
        if level == "full":
            load_image(path)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno):
            raise cause from None  # the system's error, not the image's: PIL's own errors have no number
        return CheckResult("too_large" if isinstance(error, TooLargeError) else "corrupt", error.what)
    return CheckResult(size=size)

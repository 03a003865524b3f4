"""What a check of a media file found, and what identifies the file that was checked."""

from __future__ import annotations

from typing import NamedTuple

LEVELS = ("none", "exists", "header", "full")
"""How far media are checked, each level including those before it; see `checks`."""


class CheckResult(NamedTuple):
    """What a check found.

    Attributes:
        reason: one word for counting, or "" when the file is good.
        detail: a sentence about what is wrong.
        size: (height, width) in pixels as displayed, when the header was read.
        frames: frames of a video, as its header says or as counted; 0 for an image.
        seconds: duration of a video; 0 for an image.
    """

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] | None = None
    frames: int = 0
    seconds: float = 0.0


class FileState(NamedTuple):
    """What identifies a file's content without reading it: length in bytes and modification time in nanoseconds."""

    size: int
    mtime_ns: int


MediaFile = tuple[str, str]
"""A file that a record names: its kind ("image" or "video") and its path."""

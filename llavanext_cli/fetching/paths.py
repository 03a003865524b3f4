"""Names that come from outside, made safe before they touch the disk."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path, PurePosixPath

from llavanext_cli.errors import ConfigError

STATE = ".llavanext"
"""Our own folder inside the user's: manifest, lock, lists of what was unpacked, partial files."""
LONGEST_PATH = 1024
LONGEST_NAME = 255


def unsafe(path: str) -> str:
    """Why a relative path may not be used, in a few words; "" when it may."""
    if not path or path in (".", "./"):
        return "it is empty"
    if "\0" in path or any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        return "it holds control characters"
    if "\\" in path:
        return "it holds a backslash"
    if path.startswith("/") or (len(path) > 1 and path[1] == ":" and path[0].isalpha()):
        return "it is absolute"
    parts = path.split("/")
    if ".." in parts:
        return "it climbs out of the folder"
    if parts[0] in (STATE, ".cache"):
        return f"{parts[0]} is not for it"
    try:
        encoded = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "it is not valid text"
    if max(encoded) > LONGEST_NAME or sum(encoded) + len(parts) > LONGEST_PATH:
        return "it is too long"
    return ""


def absolute(path: Path) -> Path:
    """A folder that the user named, from the root. Raises `ConfigError` for the home of a user whom nobody knows."""
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError:
        raise ConfigError(f"there is no home folder for {path}", f"For a folder of that name write ./{path}") from None


def files(count: int) -> str:
    """`1 file`, `2 files`."""
    return f"{count} file{'' if count == 1 else 's'}"


def normal(path: str) -> str:
    """A relative path without "./", "//" and a last "/": what is compared and recorded. Check `unsafe` first."""
    return str(PurePosixPath(path))


def matches(path: str, pattern: str) -> bool:
    """Whether a glob of the registry covers a path: one without a slash stays at the top, `**` is everything."""
    if pattern == "**":
        return True
    return ("/" in pattern or "/" not in path) and fnmatch.fnmatchcase(path, pattern)


def matches_loosely(path: str, pattern: str) -> bool:
    """Whether a glob that a user typed covers a path: `*` crosses slashes, and the name alone is enough."""
    names = (path, path.rpartition("/")[2])
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)

"""Remembers what checks of media found, in a file beside the output, so that the same mix takes seconds next time.

A result counts as long as the file's length and modification time are the same, and the check was at least as thorough.
The file is an SQLite database: it holds a million results without keeping them in memory, and survives an interrupt.
It is a convenience and never stops a mix: where it cannot be written, results are kept in memory for this run. A
damaged one is written again, and a file of that name that no mix has written is left alone.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from llavanext_cli.mixing.check_result import LEVELS, CheckResult, FileState, MediaFile

VERSION = 2
"""Increased when a check changes its mind about files, so that old results are forgotten."""

APPLICATION_ID = int.from_bytes(b"lnxt", "big")
"""SQLite's mark in a database file, at byte 68, that distinguishes our caches from others' databases."""

CONTENT_REASONS = ("", "corrupt", "too_large", "no_frames", "false_count")
"""Reasons that depend on a file's content alone. Others, such as a disk error or a time limit, may differ tomorrow."""

SAVE_EVERY = 2000
"""Results that an interrupt may cost."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS media (
    path TEXT, kind TEXT, size INTEGER, mtime_ns INTEGER, level INTEGER, frames_wanted INTEGER,
    reason TEXT, detail TEXT, height INTEGER, width INTEGER, frames INTEGER, seconds REAL,
    PRIMARY KEY (path, kind)) WITHOUT ROWID"""


class CheckCache:
    """Results by kind and absolute path. With `path` None it is in memory.

    Attributes:
        is_kept: the results of this run are in the file.
        is_foreign: something else has the name of the cache.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.is_foreign = path is not None and not _is_ours(path)
        self.is_kept = path is not None and not self.is_foreign
        self._unsaved = 0
        self._database = sqlite3.connect(":memory:")
        try:
            self._open(str(path) if self.is_kept else ":memory:")
        except sqlite3.DatabaseError as error:
            self._recover(error)

    def _open(self, name: str) -> None:
        self._database = sqlite3.connect(name, isolation_level=None, timeout=1.0)
        self._database.execute("PRAGMA synchronous = OFF")
        if self._database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            self._database.execute("DROP TABLE IF EXISTS media")
        self._database.execute(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {VERSION}")
        self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._database.execute("BEGIN IMMEDIATE")

    def _recover(self, error: sqlite3.DatabaseError) -> None:
        """Write a damaged cache again; use memory where another mix holds it or the disk is full."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        if self.is_kept and self.path and not isinstance(error, sqlite3.OperationalError):
            with contextlib.suppress(sqlite3.DatabaseError, OSError):
                self.path.unlink()
                self.path.with_name(self.path.name + "-journal").unlink(missing_ok=True)
                self._open(str(self.path))
                return
        self.is_kept = False
        self._open(":memory:")

    def find(self, states: Mapping[MediaFile, FileState], level: str, frames: int) -> dict[MediaFile, CheckResult]:
        """The known results for files in these states, at `level` and for videos of `frames` frames."""
        try:
            return self._find(states, level, frames)
        except sqlite3.DatabaseError as error:
            self._recover(error)
            return {}

    def _find(self, states: Mapping[MediaFile, FileState], level: str, frames: int) -> dict[MediaFile, CheckResult]:
        rows = self._database.execute(
            "SELECT kind, path, size, mtime_ns, level, frames_wanted, reason, detail, height, width, frames, seconds"
            " FROM media WHERE path IN (SELECT value FROM json_each(?))",
            (json.dumps([path for _, path in states]),),
        )
        found = {}
        for kind, path, size, mtime_ns, known_level, wanted, reason, detail, height, width, count, seconds in rows:
            if (size, mtime_ns) != states.get((kind, path)) or known_level < LEVELS.index(level):
                continue
            if kind == "video" and level == "full" and wanted != frames:
                continue
            found[kind, path] = CheckResult(reason, detail, (height, width) if height else None, count, seconds)
        return found

    def add(self, entries: Iterable[tuple[MediaFile, FileState, CheckResult]], level: str, frames: int) -> None:
        """Remember results (file, its state before the check, result), if they depend on the content alone."""
        checked_as = (LEVELS.index(level), frames)
        rows = [
            (path, kind, *state, *checked_as, r.reason, r.detail, *(r.size or (0, 0)), r.frames, r.seconds)
            for (kind, path), state, r in entries
            if r.reason in CONTENT_REASONS
        ]
        try:
            self._database.executemany(f"INSERT OR REPLACE INTO media VALUES ({', '.join('?' * 12)})", rows)
            self._unsaved += len(rows)
            if self._unsaved >= SAVE_EVERY:
                self._unsaved = 0
                self._database.execute("COMMIT")
                self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError as error:  # a full disk, for one
            self._recover(error)

    def close(self) -> None:
        """Save and close. A cache without results is removed; on a full disk the last results are lost."""
        is_empty = False
        with contextlib.suppress(sqlite3.DatabaseError):
            is_empty = self._database.execute("SELECT 1 FROM media LIMIT 1").fetchone() is None
            self._database.execute("COMMIT")
        self._database.close()
        if is_empty and self.is_kept and self.path:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether a mix may write to `path`: it is missing or empty, or a cache that a mix has written, damaged or not."""
    try:
        if not path.exists():
            return True
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(72)
    except OSError:
        return False
    return not head or (head.startswith(b"SQLite format 3\0") and head[68:] == APPLICATION_ID.to_bytes(4, "big"))

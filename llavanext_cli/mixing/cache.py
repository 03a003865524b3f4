"""Remembers what checks of media found, in a file beside the output, so that a mix can be made again in seconds.

A verdict counts as long as the file's length and time of change are the same, and the check was at least as thorough.
The file is an SQLite database: it knows a million verdicts without holding them in memory, and survives an interrupt.
It is a convenience, never a reason to stop: where it cannot be written, the mix goes on without. A damaged one is made
anew, and a file of that name that no mix has made is left alone.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from llavanext_cli.mixing.media import LEVELS, FileState, Verdict

VERSION = 2
"""Raised when a check changes its mind about files, so that old verdicts are forgotten."""

MARK = int.from_bytes(b"lnxt", "big")
"""SQLite's application_id: what tells a cache of ours from another's database."""
_MAGIC, _MARK_PLACE = b"SQLite format 3\0", slice(68, 72)
_UNMARKED = b"level INTEGER, frames_wanted INTEGER"
"""Stands in the first page of a cache of version 1, which had no mark."""

OF_CONTENT = ("", "corrupt", "too_large", "no_frames", "false_count")
"""Reasons that lie in a file's content. Other verdicts, such as those of a disk that fails or a worker that was ended
for want of memory, may be different tomorrow."""

SAVE_EVERY = 2000
"""Verdicts that an interrupt may cost."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS media (
    path TEXT, kind TEXT, size INTEGER, mtime_ns INTEGER, level INTEGER, frames_wanted INTEGER,
    reason TEXT, detail TEXT, height INTEGER, width INTEGER, frames INTEGER, seconds REAL,
    PRIMARY KEY (path, kind)) WITHOUT ROWID"""


class VerdictCache:
    """Verdicts by absolute path and kind. Without a path it lives in memory, for the length of one run."""

    def __init__(self, path: Path | None):
        self.path = path
        self.is_kept = path is not None
        self._unsaved = 0
        self.is_strange = path is not None and not _is_ours(path)
        """Something else has the name of the cache."""
        if self.is_strange:
            self._forget()
            return
        try:
            self._open(str(path) if path else ":memory:")
        except sqlite3.DatabaseError as fault:
            self._recover(fault)

    def _open(self, name: str) -> None:
        self._database = sqlite3.connect(name, isolation_level=None, timeout=1.0)
        self._database.execute("PRAGMA synchronous = OFF")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            self._database.execute("DROP TABLE IF EXISTS media")
        self._database.execute(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {VERSION}")
        self._database.execute(f"PRAGMA application_id = {MARK}")
        self._database.execute("BEGIN IMMEDIATE")

    def _recover(self, fault: sqlite3.DatabaseError) -> None:
        """Begin anew where the cache is damaged, and go on in memory where another mix holds it or the disk is full."""
        if isinstance(fault, sqlite3.OperationalError) or not self.is_kept:
            self._forget()
            return
        try:
            self._database.close()
            self.path.unlink()
            self.path.with_name(self.path.name + "-journal").unlink(missing_ok=True)
            self._open(str(self.path))
        except (sqlite3.DatabaseError, OSError):
            self._forget()

    def _forget(self) -> None:
        """Go on in memory; what the file holds stays as it is."""
        with contextlib.suppress(Exception):
            self._database.close()
        self.is_kept = False
        self._open(":memory:")

    def find(self, kind: str, states: dict[str, FileState], level: str, frames: int) -> dict[str, Verdict]:
        """Verdicts for those of `states` (path → state) that are known at `level` for clips of `frames` frames."""
        try:
            return self._look_up(kind, states, level, frames)
        except sqlite3.DatabaseError as fault:
            self._recover(fault)
            return {}

    def _look_up(self, kind: str, states: dict[str, FileState], level: str, frames: int) -> dict[str, Verdict]:
        rows = self._database.execute(
            "SELECT path, size, mtime_ns, level, frames_wanted, reason, detail, height, width, frames, seconds"
            " FROM media WHERE kind = ? AND path IN (SELECT value FROM json_each(?))",
            (kind, json.dumps(list(states))),
        )
        found = {}
        for path, size, mtime_ns, known_level, wanted, reason, detail, height, width, count, seconds in rows:
            if (size, mtime_ns) != states[path] or known_level < LEVELS.index(level):
                continue
            if kind == "video" and level == "full" and wanted != frames:
                continue
            found[path] = Verdict(reason, detail, (height, width) if height else None, count, seconds)
        return found

    def add(self, entries: Iterable[tuple[str, str, FileState, Verdict]], level: str, frames: int) -> None:
        """Remember verdicts: (kind, path, state before the check, verdict); those that are not `OF_CONTENT` pass by."""
        rows: Sequence[tuple] = [
            (
                path,
                kind,
                *state,
                LEVELS.index(level),
                frames,
                v.reason,
                v.detail,
                *(v.size or (0, 0)),
                v.frames,
                v.seconds,
            )
            for kind, path, state, v in entries
            if v.reason in OF_CONTENT
        ]
        try:
            self._database.executemany(f"INSERT OR REPLACE INTO media VALUES ({', '.join('?' * 12)})", rows)
            self._unsaved += len(rows)
            if self._unsaved >= SAVE_EVERY:
                self.save()
        except sqlite3.DatabaseError as fault:  # a full disk: what was found so far is not worth stopping for
            self._recover(fault)

    def save(self) -> None:
        """Bring what was added to the file."""
        self._unsaved = 0
        self._database.execute("COMMIT")
        self._database.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Save and close; a disk that is full now costs the last entries and nothing else. Without a verdict, the file
        goes again."""
        is_empty = False
        with contextlib.suppress(sqlite3.DatabaseError):
            is_empty = self._database.execute("SELECT 1 FROM media LIMIT 1").fetchone() is None
            self._database.execute("COMMIT")
        self._database.close()
        if is_empty and self.is_kept:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether a mix may write to `path`: nothing is there, or it is a cache that a mix has made, damaged or not."""
    try:
        if not path.exists():
            return True
        if not path.is_file():
            return False
        with path.open("rb") as file:
            page = file.read(4096)
    except OSError:
        return False
    if not page:
        return True
    marked = int.from_bytes(page[_MARK_PLACE], "big") == MARK
    return page.startswith(_MAGIC) and (marked or _UNMARKED in page)

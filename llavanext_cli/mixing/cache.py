"""Remembers what checks of media found, in a file beside the output, so that a mix can be made again in seconds.

A verdict counts as long as the file's length and time of change are the same, and the check was at least as thorough.
The file is an SQLite database: it knows a million verdicts without holding them in memory, and survives an interrupt.
It is a convenience, never a reason to stop: where it cannot be written, the mix goes on without.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from llavanext_cli.mixing.media import LEVELS, FileState, Verdict

VERSION = 1
"""Raised when a check changes its mind about files, so that old verdicts are forgotten."""

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
        try:
            self._open(str(path) if path else ":memory:")
        except sqlite3.OperationalError:  # another mix holds it, or the file system knows no locks
            self._forget()
        except sqlite3.DatabaseError:  # not a database, or a damaged one
            try:
                path.unlink()
                self._open(str(path))
            except (sqlite3.DatabaseError, OSError):
                self._forget()

    def _open(self, name: str) -> None:
        self._database = sqlite3.connect(name, isolation_level=None, timeout=1.0)
        self._database.execute("PRAGMA synchronous = OFF")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            self._database.execute("DROP TABLE IF EXISTS media")
        self._database.execute(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {VERSION}")
        self._database.execute("BEGIN IMMEDIATE")

    def _forget(self) -> None:
        """Go on in memory; what the file holds stays as it is."""
        with contextlib.suppress(Exception):
            self._database.close()
        self.is_kept = False
        self._open(":memory:")

    def find(self, kind: str, states: dict[str, FileState], level: str, frames: int) -> dict[str, Verdict]:
        """Verdicts for those of `states` (path → state) that are known at `level` for clips of `frames` frames."""
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

    def add(
        self, entries: Iterable[tuple[str, str, FileState, Verdict]], level: str, frames: int, save_every: int = 2000
    ) -> None:
        """Remember verdicts: (kind, path, state before the check, verdict)."""
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
        ]
        try:
            self._database.executemany(f"INSERT OR REPLACE INTO media VALUES ({', '.join('?' * 12)})", rows)
            self._unsaved += len(rows)
            if self._unsaved >= save_every:
                self.save()
        except sqlite3.DatabaseError:  # a full disk: what was found so far is not worth stopping for
            self._forget()

    def save(self) -> None:
        """Bring what was added to the file."""
        self._unsaved = 0
        self._database.execute("COMMIT")
        self._database.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Save and close; a disk that is full now costs the last entries and nothing else."""
        with contextlib.suppress(sqlite3.DatabaseError):
            self._database.execute("COMMIT")
        self._database.close()

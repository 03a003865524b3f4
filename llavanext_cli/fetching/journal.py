"""Which bytes of a partial file are there: a text file beside it that survives `kill -9`.

    weights.bin.part           the file at its full length, with holes
    weights.bin.part.journal   {"journal": 1, "size": 5242880, "validator": "\\"abc\\""}
                               0 1048576              one line for each stretch that was written, start and end
                               3145728 4194304

A line follows its bytes, so a process that dies loses at most the last stretch. What a crash of the whole machine may
do to both is found by the digest at the end.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path


def journal_path(part: Path) -> Path:
    """Where the journal of a partial file is; there is none when the file is complete."""
    return part.with_name(part.name + ".journal")


class Journal:
    """The stretches of one partial file. Safe to use from several threads.

    Args:
        part: the partial file.
        size: bytes of the whole file.
        validator: what names this version of it (a digest, the server's ETag or date); "" when nothing does.
    """

    def __init__(self, part: Path, size: int, validator: str):
        self.path = journal_path(part)
        self.size = size
        self._lock = threading.Lock()
        self._head = {"journal": 1, "size": size, "validator": validator}
        # Without a validator nobody can tell whether the file changed meanwhile, so nothing is resumed.
        self.spans = self._read() if validator and part.is_file() and part.stat().st_size == size else []
        if not self.spans:
            self._start(part)
        self._file = open(self.path, "a", encoding="ascii")  # noqa: SIM115 - closed in close()

    def add(self, start: int, end: int) -> None:
        """Record that bytes start..end-1 are in the file."""
        if end <= start:
            return
        with self._lock:
            self.spans = merge([*self.spans, (start, end)])
            self._file.write(f"{start} {end}\n")
            self._file.flush()

    def missing(self) -> list[tuple[int, int]]:
        """The stretches that are not there, in order."""
        holes, position = [], 0
        for start, end in self.spans:
            if start > position:
                holes.append((position, start))
            position = max(position, end)
        if position < self.size:
            holes.append((position, self.size))
        return holes

    @property
    def done(self) -> int:
        """Bytes that are there."""
        return sum(end - start for start, end in self.spans)

    @property
    def prefix(self) -> int:
        """Bytes that are there from the start without a hole."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _start(self, part: Path) -> None:
        self.path.unlink(missing_ok=True)  # first, so that it never speaks of bytes that are gone
        with open(part, "wb") as file:
            os.ftruncate(file.fileno(), self.size)
        self.path.write_text(json.dumps(self._head) + "\n", encoding="ascii")

    def _read(self) -> list[tuple[int, int]]:
        try:
            head, *lines = self.path.read_text(encoding="ascii").split("\n")
            if json.loads(head) != self._head:
                return []
        except (OSError, ValueError):
            return []
        spans = []
        for line in lines[:-1]:  # what follows the last line end was cut off while it was written
            words = line.split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                start, end = int(words[0]), int(words[1])
                if start < end <= self.size:
                    spans.append((start, end))
        return merge(spans)


def merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as sorted stretches that neither touch nor overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged

"""The step at which a run that was told to end saves: one that every worker learns of before finishing it.

Told by a signal, the first worker writes the number of its next step into a file. No worker can finish that step
before the first one takes part in it, so each finds the number in time, and all save the same step.
"""

from __future__ import annotations

import threading
from pathlib import Path

from llavanext_cli.files import write_whole


class GracefulStop:
    """Asked after every step by every worker.

    Args:
        file: `OUT/logs/stop_after`, made by the launcher before the workers start: a network file system shows what is
            new in a file that was there at once, but perhaps not a file that is new.
        rank, ranks: this worker among all.
    """

    def __init__(self, file: Path, rank: int, ranks: int):
        self.file, self.rank, self.ranks = file, rank, ranks
        self.told = threading.Event()

    def reached(self, step: int) -> bool:
        """Whether this step, just finished, is the last one: to be saved, and to end the run after."""
        if self.rank == 0 and self.told.is_set():
            if self.ranks == 1:
                return True
            if not self._read():
                self._write(step + 1)
        return 0 < self._read() <= step

    def reset(self) -> None:
        """For a new start of the run."""
        self._write(0)

    def _read(self) -> int:
        return int(self.file.read_text(encoding="ascii"))

    def _write(self, step: int) -> None:
        write_whole(self.file, str(step).encode("ascii"))

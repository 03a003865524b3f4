"""All workers save the same step when a signal ends a run.

The first worker receives the signal and writes the number of its next step into a file. No worker can finish that step
before the first one takes part in it, so each of them reads the number in time.
"""

from __future__ import annotations

import threading
from pathlib import Path

from llavanext_cli.files import write_whole


class GracefulStop:
    """Asked by every worker after every step whether to stop.

    Args:
        file: `OUT/logs/stop_after`. The launcher creates it before the workers start, because a network file system
            shows new content of an old file at once, but perhaps not a new file.
        rank, ranks: this worker among all.
    """

    def __init__(self, file: Path, rank: int, ranks: int):
        self.file, self.rank, self.ranks = file, rank, ranks
        self.requested = threading.Event()

    def reached(self, step: int) -> bool:
        """Whether the run ends after this step, which was just finished and is to be saved."""
        if self.rank == 0 and self.requested.is_set():
            if self.ranks == 1:
                return True
            if not self._read():
                self._write(step + 1)
        return 0 < self._read() <= step

    def reset(self) -> None:
        """Forget an earlier request: the run starts again."""
        self._write(0)

    def _read(self) -> int:
        return int(self.file.read_text(encoding="ascii"))

    def _write(self, step: int) -> None:
        write_whole(self.file, str(step).encode("ascii"))

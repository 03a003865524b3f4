"""The processes of a run on this machine: started, watched and killed, so that none outlives the run.

A process group does not hold them all: MindSpore's `msrun` gives every worker a session of its own, and data readers
are children of workers. They are found by a mark in their environment, which every descendant inherits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "LLAVANEXT_RUN"
POLL_SECONDS = 0.2
SAVE_SECONDS = 6.0
"""How long the first worker gets to finish its step and begin to save when a signal ends a run."""
_PR_SET_PDEATHSIG = 1
_MSRUN_END = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


@dataclass(frozen=True)
class Ended:
    """A worker that failed: its rank, and its exit code (negative: the signal that killed it)."""

    rank: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"worker {self.rank} was killed by {signal.Signals(-self.code).name}"
        return f"worker {self.rank} exited with code {self.code}"


class Workers:
    """All processes of one run on this machine. Use it as a context manager: none is left after it.

    Args:
        command: starts them.
        log: file for what the command itself prints.
        pids: folder in which worker R writes its process id, as `worker_R.pid`.
        ranks: of the workers on this machine; the folder may hold those of other nodes.
        environment, folder: of the command.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        pids: Path,
        ranks: Sequence[int],
        environment: Mapping[str, str],
        folder: Path,
    ):
        self.log, self.pids, self.ranks = log, pids, ranks
        self.mark = uuid.uuid4().hex
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_begin,
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        self.process.wait()

    def poll(self) -> int | None:
        """None while they run, then their exit code (negative: the signal that killed the command)."""
        code = self.process.poll()
        if code is None and (ended := self.find_ended()) is not None:
            kill_marked(self.mark)
            self.process.wait()
            return ended.code or 1
        return code

    def find_ended(self) -> Ended | None:
        """The worker that failed first: msrun names it, and ends the others after it."""
        ranks = {pid: rank for rank, pid in self.workers().items()}
        text = self.log.read_text(encoding="utf-8", errors="replace")
        for found in _MSRUN_END.finditer(text):
            if int(found[1]) in ranks:
                return Ended(ranks[int(found[1])], int(found[2]))
        if self.process.poll():
            return Ended(self.ranks[0], self.process.returncode) if len(ranks) == 1 else None
        return None

    def workers(self) -> dict[int, int]:
        """Rank → process id of the workers that have started here."""
        found = {}
        for rank in self.ranks:
            with contextlib.suppress(ValueError, OSError):
                found[rank] = int((self.pids / f"worker_{rank}.pid").read_text(encoding="ascii"))
        return found

    def stop(self, saving: Callable[[], bool] = lambda: False) -> None:
        """Let the first worker finish its step and save, for as long as `saving` says that it does; then kill all."""
        first = self.workers().get(0)
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)
            deadline = time.monotonic() + SAVE_SECONDS
            while _alive(first) and self.process.poll() is None and (time.monotonic() < deadline or saving()):
                time.sleep(POLL_SECONDS)
        kill_marked(self.mark)


def _begin() -> None:
    """In the new process: msrun ignores SIGTERM, which a scheduler may send to every process. Its end would kill the
    workers before they save."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_marked(mark: str) -> None:
    """Kill every process that carries the mark, and wait until none is left."""
    deadline = time.monotonic() + 10
    while (left := find_marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def find_marked(mark: str) -> list[int]:
    """Processes of this user that inherited the mark and have not ended."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_with_parent() -> None:
    """The kernel kills this process when its parent ends for any reason (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
